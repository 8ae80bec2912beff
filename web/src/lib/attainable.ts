/// What could be reached at each β: a table over the slider's positions, made once, so that dragging looks a row up.

import type { GhostTable } from './api'
import { betaAt, POSITIONS } from './beta'
import { ghost, SOLID_ESS } from './ghost'

export interface Attainable {
  readonly beta: number
  /** Score gained over the reference. */
  readonly gain: number
  readonly kl: number
  readonly ess: number
  readonly solid: boolean
}

/** From the server's table, by interpolation in log β; β = 0 is its smallest β. */
export function fromTable(table: GhostTable): Attainable[] {
  const logs = table.betas.map(Math.log)
  const maybe = table.solid.some(Boolean)
  return Array.from({ length: POSITIONS + 1 }, (_, position) => {
    const beta = betaAt(position)
    const z = Math.log(Math.max(beta, table.betas[0] ?? 1))
    let i = 0
    while (i < logs.length - 2 && logs[i + 1]! < z) i++
    const share = Math.min(1, Math.max(0, (z - logs[i]!) / (logs[i + 1]! - logs[i]!)))
    const mix = (column: number[]) => column[i]! * (1 - share) + column[i + 1]! * share
    const ess = mix(table.ess)
    return { beta, gain: mix(table.gain), kl: mix(table.kl), ess, solid: maybe && ess >= SOLID_ESS }
  })
}

/** From scores of reference samples themselves. */
export function fromScores(scores: ArrayLike<number>): Attainable[] {
  const start = ghost(scores, 1e9)?.score ?? 0
  return Array.from({ length: POSITIONS + 1 }, (_, position) => {
    const beta = betaAt(position)
    const found = ghost(scores, beta)!
    return { beta, gain: found.score - start, kl: found.kl, ess: found.ess, solid: found.ess >= SOLID_ESS }
  })
}
