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
