/// A pocket world that trains on the page: its state, as the components show it.

import { Curve } from '../lib/curve'
import type { Token } from '../lib/api'
import { PocketTrainer, type Fault, type Reply, type Seen, type Settings } from '../pocket/ppo'
import { END, optimum, pocketWorld, standing, textOf, WORDS, type Standing, type Weakness } from '../pocket/world'

const RATE = 18
const MOST = 600
let playing: PocketRun | null = null

export class PocketRun {
  beta = $state(0.4)
  fault = $state<Fault | null>(null)
  weakness = $state<Weakness>('buzzwords')
  running = $state(false)
  version = $state(0)
  step = $state(0)
  now = $state.raw<Standing>({ score: 0, gold: 0, kl: 0, length: 0 })
  seen = $state.raw<Seen[]>([])
  sample = $state.raw<Reply | null>(null)
  said = $state.raw<{ step: number; text: string; score: number }[]>([])
  changes = $state.raw<{ step: number; beta: number }[]>([])
  readonly curves = {
    score: new Curve(), gold: new Curve(), kl: new Curve(), nonScore: new Curve(), clipped: new Curve(), valueError: new Curve(),
  }
  private trainer!: PocketTrainer
  private frame = 0
  private last = 0

  constructor(options: { beta?: number; weakness?: Weakness; fault?: Fault | null } = {}) {
    this.beta = options.beta ?? 0.4
    this.weakness = options.weakness ?? 'buzzwords'
    this.fault = options.fault ?? null
    this.reset()
  }

  get prompt(): string {
    return pocketWorld(this.weakness).prompt
  }

  /** The exact best at a β, on the same scale as `now`. */
  best(beta: number): Standing | null {
    return beta > 0 ? standing(this.trainer.world, optimum(this.trainer.world, beta)) : null
  }

  reset(change: { beta?: number; weakness?: Weakness; fault?: Fault | null } = {}): void {
    this.pause()
    if (change.beta !== undefined) this.beta = change.beta
    if (change.weakness !== undefined) this.weakness = change.weakness
    if (change.fault !== undefined) this.fault = change.fault
    const settings: Partial<Settings> = { beta: this.beta, fault: this.fault }
    this.trainer = new PocketTrainer(pocketWorld(this.weakness), settings)
    for (const curve of Object.values(this.curves)) curve.cut(-1)
    this.step = 0
    this.now = this.trainer.standing()
    this.seen = [...this.trainer.seen]
    this.sample = null
    this.said = []
    this.changes = []
    this.version += 1
  }

  pull(beta: number): void {
    this.beta = beta
    this.trainer.settings.beta = beta
    if (this.step > 0 && this.changes.at(-1)?.step !== this.step) this.changes = [...this.changes, { step: this.step, beta }]
  }

  advance(): void {
    const told = this.trainer.update()
    const { score, gold, kl } = told.exact
    const numbers = { score, gold, kl, nonScore: told.nonScore, clipped: told.clipped, valueError: told.valueError }
    for (const [name, value] of Object.entries(numbers)) this.curves[name as keyof typeof numbers].push(told.step, value)
    this.step = told.step + 1
    this.now = told.exact
    this.sample = told.sample
    if (told.step % 6 === 0) {
      this.said = [{ step: told.step, text: textOf(told.sample.words), score: told.sample.score }, ...this.said].slice(0, 5)
    }
    if (this.trainer.seen.length !== this.seen.length) this.seen = [...this.trainer.seen]
    this.version += 1
    if (this.step >= MOST) this.pause()
  }

  play(): void {
    playing?.pause()
    playing = this
    if (this.step >= MOST) this.reset()
    this.running = true
    const go = (now: number) => {
      if (!this.running) return
      if (now - this.last >= 1000 / RATE) {
        this.last = now
        this.advance()
      }
      this.frame = requestAnimationFrame(go)
    }
    this.frame = requestAnimationFrame(go)
  }

  pause(): void {
    this.running = false
    cancelAnimationFrame(this.frame)
  }

  toggle(): void {
    if (this.running) this.pause()
    else this.play()
  }
}

/** The tokens of a reply as the other screens show them. */
export function tokensOf(reply: Reply): Token[] {
  return reply.words.map((word, t) => ({
    text: word === END ? '.' : `${t ? ' ' : ''}${WORDS[word]}`,
    kl: reply.logprobs[t]! - reply.refLogprobs[t]!,
    logprob: reply.logprobs[t]!,
    ref_logprob: reply.refLogprobs[t]!,
    value: reply.values[t]!,
    advantage: reply.advantages[t] ?? null,
  }))
}
