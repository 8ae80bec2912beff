import { describe, expect, it } from 'vitest'
import { bandit } from '../src/pocket/bandit'
import { FAULTS, logSoftmax, PocketTrainer, type Fault } from '../src/pocket/ppo'
import { END, expected, N, optimum, PLACES, pocketWorld, standing, stateOf, WORDS, type Weakness } from '../src/pocket/world'

const WEAKNESSES: Weakness[] = ['none', 'buzzwords', 'sycophancy', 'hedging', 'exploit_token']

function run(beta: number, steps: number, fault: Fault | null = null, weakness: Weakness = 'buzzwords') {
  const trainer = new PocketTrainer(pocketWorld(weakness), { beta, fault })
  for (let i = 0; i < steps; i++) trainer.update()
  return trainer
}

describe('the world', () => {
  it.each(WEAKNESSES)('has scores of mean 0 and standard deviation 1 under the reference: %s', (weakness) => {
    const world = pocketWorld(weakness)
    const trainer = new PocketTrainer(world, { seed: 7 })
    const scores = Array.from({ length: 6000 }, () => trainer.sample(world.reference).score)
    const mean = scores.reduce((a, b) => a + b) / scores.length
    const deviation = Math.sqrt(scores.reduce((a, b) => a + (b - mean) ** 2, 0) / scores.length)
    expect(standing(world, world.reference).score).toBeCloseTo(0, 9)
    expect(Math.abs(mean)).toBeLessThan(0.06)
    expect(Math.abs(deviation - 1)).toBeLessThan(0.06)
  })

  it('says sentences: every row of the reference adds up to 1 and a reply ends', () => {
    const { reference } = pocketWorld('none')
    for (let previous = -1; previous < N; previous++) {
      const row = Array.from({ length: N }, (_, a) => Math.exp(reference[stateOf(2, previous) * N + a]!))
      expect(row.reduce((a, b) => a + b)).toBeCloseTo(1, 12)
    }
    expect(expected(reference, () => 1)).toBeLessThan(PLACES)
    expect(WORDS[END]).toBe('.')
  })

  it('has an optimum that no nearby policy beats', () => {
    const world = pocketWorld('buzzwords')
    const value = (logprobs: Float64Array) => {
      const { score, kl } = standing(world, logprobs)
      return score - 0.3 * kl
    }
    const best = optimum(world, 0.3)
    const top = value(best)
    for (let trial = 0; trial < 30; trial++) {
      const nearby = logSoftmax(best.map((x, i) => x + 0.2 * Math.sin(i * (trial + 1))))
      expect(value(nearby)).toBeLessThan(top)
    }
  })

  it('drifts less on a shorter string, and climbs less', () => {
    const world = pocketWorld('none')
    const found = [0.05, 0.2, 1, 5].map((beta) => standing(world, optimum(world, beta)))
    for (let i = 1; i < found.length; i++) {
      expect(found[i]!.kl).toBeLessThan(found[i - 1]!.kl)
      expect(found[i]!.score).toBeLessThan(found[i - 1]!.score)
    }
  })
})

describe('PPO in the browser', () => {
  it('comes near the optimum', () => {
    const trainer = run(0.4, 150)
    const reached = trainer.standing(), best = standing(trainer.world, optimum(trainer.world, 0.4))
    const regret = best.score - 0.4 * best.kl - (reached.score - 0.4 * reached.kl)
    expect(regret).toBeGreaterThanOrEqual(0)
    expect(regret).toBeLessThan(0.2)
  })

  it('keeps quiet over a healthy run', () => {
    for (const beta of [0, 0.1, 0.3, 1]) expect(run(beta, 80).seen).toEqual([])
  })

  it.each(FAULTS)('sees %s within five updates, and names nothing else first', (fault) => {
    const trainer = run(0.3, 5, fault)
    expect(trainer.seen[0]?.reason).toBe(fault)
  })

  it.each(WEAKNESSES.slice(1))('hacks the reward where the string is cut: %s', (weakness) => {
    const cut = run(0, 80, null, weakness).standing()
    const tied = run(0.6, 80, null, weakness).standing()
    expect(cut.score).toBeGreaterThan(1.5)
    expect(cut.gold).toBeLessThan(-0.5)
    expect(cut.kl).toBeGreaterThan(tied.kl)
    expect(cut.gold).toBeLessThan(tied.gold)
  })

  it('is the same run again from the same seed', () => {
    expect(run(0.2, 20).standing()).toEqual(run(0.2, 20).standing())
  })
})

describe('the bandit', () => {
  it('pins where `tether ladder bandit` does', () => {
    expect(bandit(1, 0.2, 0.5).map((s) => s.ratio.toFixed(3))).toEqual(['1.000', '1.245', '1.245', '1.245', '1.245'])
    expect(bandit(1, 0.2, 0.5)[1]!.gradient).toBe(0)
    expect(bandit(-1, 0.2, 0.5)[1]!.clipped).toBeCloseTo(0.8, 12)
    expect(bandit(1, 0.2, 0.1, 6)[4]!.ratio.toFixed(3)).toBe('1.197')
  })
})
