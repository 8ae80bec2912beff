/// The slider's scale: position 0 is β = 0 (no string), then each step is 5 %, from 0.001 to about 3.

export const LEAST = 0.001
export const RATIO = 1.05
export const POSITIONS = 165

export function betaAt(position: number): number {
  return position <= 0 ? 0 : Number((LEAST * RATIO ** (Math.min(position, POSITIONS) - 1)).toPrecision(3))
}

/** The nearest position; a β that is not on the scale goes to its neighbour. */
export function positionOf(beta: number): number {
  if (!(beta > 0)) return 0
  return Math.max(1, Math.min(POSITIONS, Math.round(Math.log(beta / LEAST) / Math.log(RATIO)) + 1))
}

/** What a string of this price is like, in a word or two. */
export function feelOf(beta: number): string {
  if (beta < 0) return 'a slingshot'
  if (beta === 0) return 'no string'
  if (beta < 0.02) return 'a very long string'
  if (beta < 0.08) return 'a long string'
  if (beta < 0.35) return 'a working length'
  if (beta < 1) return 'a short string'
  return 'tied to the floor'
}
