/// Rung one: the clip alone, one logit and two actions.

export interface BanditStep {
  readonly step: number
  readonly ratio: number
  readonly clipped: number
  readonly loss: number
  readonly gradient: number
}

const sigmoid = (z: number) => 1 / (1 + Math.exp(-z))
const OLD = 0.5

/** The trace of `steps` pushes along the gradient's sign, as `tether ladder bandit` prints it. */
export function bandit(advantage: number, clip: number, rate: number, steps = 5): BanditStep[] {
  const found: BanditStep[] = []
  let logit = 0
  for (let step = 0; step < steps; step++) {
    const p = sigmoid(logit)
    const ratio = p / OLD
    const clipped = Math.min(1 + clip, Math.max(1 - clip, ratio))
    const term = Math.min(ratio * advantage, clipped * advantage)
    const pinned = term !== ratio * advantage
    const gradient = pinned ? 0 : (-advantage * p * (1 - p)) / OLD
    found.push({ step, ratio, clipped, loss: -term, gradient })
    if (gradient !== 0) logit += rate * advantage
  }
  return found
}

/** min(ratio·A, clip(ratio)·A) of one token. */
export function objective(ratio: number, advantage: number, clip: number): number {
  return Math.min(ratio * advantage, Math.min(1 + clip, Math.max(1 - clip, ratio)) * advantage)
}
