/// The ghost: the best that this reward could give on a string of price β, from samples of the reference alone.
///
/// For N reference samples with scores r_i the optimum at β is a reweighting, w_i ∝ e^{r_i/β}:
///
///     r(β) = Σ w_i r_i     K(β) = Σ w_i log(N w_i)     ESS = 1 / Σ w_i²
///
/// Below an effective sample size of 20 a handful of samples speaks for all, so it is drawn faded.

export interface Ghost {
  readonly beta: number
  /** Mean score of the reweighted samples. */
  readonly score: number
  /** Nats a reply. */
  readonly kl: number
  /** Effective sample size. */
  readonly ess: number
}

export const SOLID_ESS = 20

/** The attainable point at β; β = 0 is the best single sample. An empty bank gives null. */
export function ghost(scores: ArrayLike<number>, beta: number): Ghost | null {
  const n = scores.length
  if (n === 0) return null
  let top = -Infinity
  for (let i = 0; i < n; i++) top = Math.max(top, scores[i]!)
  if (beta <= 0) return { beta, score: top, kl: Math.log(n), ess: 1 }
  let sum = 0, sumR = 0, sumSquares = 0, sumLog = 0
  for (let i = 0; i < n; i++) {
    const z = (scores[i]! - top) / beta
    const w = Math.exp(z)
    sum += w
    sumR += w * scores[i]!
    sumSquares += w * w
    sumLog += w * z
  }
  return {
    beta,
    score: sumR / sum,
    kl: Math.max(0, sumLog / sum - Math.log(sum) + Math.log(n)),
    ess: (sum * sum) / sumSquares,
  }
}

export function mean(x: ArrayLike<number>): number {
  let sum = 0
  for (let i = 0; i < x.length; i++) sum += x[i]!
  return x.length ? sum / x.length : NaN
}

export function deviation(x: ArrayLike<number>): number {
  const m = mean(x)
  let sum = 0
  for (let i = 0; i < x.length; i++) sum += (x[i]! - m) ** 2
  return x.length ? Math.sqrt(sum / x.length) : NaN
}
