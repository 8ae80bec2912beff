/// One pocket run for each β, trained on the page: the sweep that a reader makes with one press.

import type { LearnData } from '../lib/api'
import { PocketTrainer } from '../pocket/ppo'
import { pocketWorld, textOf } from '../pocket/world'

export const BETAS = [0, 0.2, 0.4, 0.6, 0.8, 1.2, 3]
const UPDATES = 70
const REPLIES = 3

/** Yields what there is after each stretch of updates; the last is whole. Waits for `pause` between stretches. */
export async function* pocketSweep(pause: () => Promise<unknown>): AsyncGenerator<LearnData['nano']> {
  const world = pocketWorld('buzzwords')
  const found: LearnData['nano'] = { points: [], curves: [], texts: [] }
  const replies = Array.from({ length: REPLIES }, () => [] as LearnData['nano']['texts'][number]['replies'])
  for (const beta of BETAS) {
    const trainer = new PocketTrainer(world, { beta })
    const curve = { beta, steps: [] as number[], score: [] as number[], kl: [] as number[], gold: [] as number[] }
    found.curves.push(curve)
    for (let step = 0; step < UPDATES; step++) {
      const { exact } = trainer.update()
      curve.steps.push(step)
      curve.score.push(exact.score)
      curve.kl.push(exact.kl)
      curve.gold.push(exact.gold)
      if (step % 10 === 9) await pause()
    }
    const end = trainer.standing()
    found.points.push({ beta, score: end.score, kl: end.kl, gold: end.gold, distinct_2: null })
    for (const each of replies) {
      const said = trainer.sample(trainer.logprobs)
      each.push({ beta, response: textOf(said.words), score: said.score, gold: null, kl: said.kl })
    }
    found.texts = replies.map((each) => ({ prompt: world.prompt, replies: each }))
    yield { points: [...found.points], curves: [...found.curves], texts: [...found.texts] }
  }
}
