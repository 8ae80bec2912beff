/// Scales, ticks and paths for the drawings that are not charts of uPlot.

export type Scale = ((x: number) => number) & { ticks(count: number): number[] }

/** A straight line from a domain to a range; with `clamp`, nothing leaves the range. */
export function linear([from, to]: [number, number], [start, end]: [number, number], clamp = false): Scale {
  const slope = to === from ? 0 : (end - start) / (to - from)
  const scale = (x: number) => {
    const y = start + (x - from) * slope
    return clamp ? Math.min(Math.max(y, Math.min(start, end)), Math.max(start, end)) : y
  }
  return Object.assign(scale, { ticks: (count: number) => ticks(from, to, count) })
}

/** Round numbers between two bounds, about `count` of them: steps of 1, 2 or 5 times a power of ten. */
export function ticks(from: number, to: number, count: number): number[] {
  if (!(to > from) || count < 1) return []
  const rough = (to - from) / count
  const power = 10 ** Math.floor(Math.log10(rough))
  const step = power * ([1, 2, 5, 10].find((factor) => factor * power >= rough * 0.8) ?? 10)
  const first = Math.ceil(from / step - 1e-9), last = Math.floor(to / step + 1e-9)
  return Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(12)))
}

type Point = readonly [number, number]

/** A broken line through the points; where one is not finite, the line ends and begins anew. */
export function polyline(points: readonly Point[]): string {
  let path = '', pen = false
  for (const [x, y] of points) {
    if (!Number.isFinite(x) || !Number.isFinite(y)) {
      pen = false
      continue
    }
    path += `${pen ? 'L' : 'M'}${x.toFixed(1)},${y.toFixed(1)}`
    pen = true
  }
  return path
}

interface Wanted {
  readonly x: number
  readonly y: number
  readonly text: string
  /** Rather left of its point. */
  readonly left?: boolean
}
type Box = readonly [left: number, top: number, right: number, bottom: number]
const LETTER = 6.3
const LINE = 13
const GAP = 9

/** Each name beside its point where it lies on no other name and on no mark; one without room is left out. */
export function arrange(
  wanted: readonly Wanted[], marks: readonly { x: number; y: number }[], [left, top, right, bottom]: Box,
): { x: number; y: number; text: string }[] {
  const taken: Box[] = marks.map(({ x, y }) => [x - 6, y - 6, x + 6, y + 6])
  return wanted.flatMap(({ x, y, text, left: leftFirst }) => {
    const wide = text.length * LETTER
    const sides = leftFirst ? [x - GAP - wide, x + GAP] : [x + GAP, x - GAP - wide]
    const places = [0, LINE, -LINE].flatMap((down) => sides.map((at) => [at, y - LINE / 2 + down] as const))
    for (const [at, over] of places) {
      const box: Box = [at, over, at + wide, over + LINE]
      const inside = box[0] >= left && box[2] <= right && box[1] >= top && box[3] <= bottom
      if (!inside || taken.some((b) => box[0] < b[2] && b[0] < box[2] && box[1] < b[3] && b[1] < box[3])) continue
      taken.push(box)
      return [{ x: at, y: over + LINE - 3, text }]
    }
    return []
  })
}
