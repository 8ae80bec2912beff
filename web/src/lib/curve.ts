/// One metric through a run: it grows at the end, and is cut where a run goes on from an earlier update.

export class Curve {
  private xs = new Float64Array(64)
  private ys = new Float64Array(64)
  private n = 0

  static of(steps: ArrayLike<number>, values: ArrayLike<number | null>): Curve {
    const curve = new Curve()
    curve.grow(steps.length)
    for (let i = 0; i < steps.length; i++) curve.push(steps[i]!, values[i] ?? NaN)
    return curve
  }

  get length(): number {
    return this.n
  }

  /** Views, not copies: they are valid until the next push. */
  get steps(): Float64Array {
    return this.xs.subarray(0, this.n)
  }

  get values(): Float64Array {
    return this.ys.subarray(0, this.n)
  }

  get last(): number {
    return this.n ? this.ys[this.n - 1]! : NaN
  }

  get lastStep(): number {
    return this.n ? this.xs[this.n - 1]! : -1
  }

  /** Steps only grow, except within a thinned column; what is told twice is heard once. */
  push(step: number, value: number): void {
    if (this.n && step <= this.xs[this.n - 1]!) return
    this.grow(this.n + 1)
    this.xs[this.n] = step
    this.ys[this.n] = value
    this.n += 1
  }

  /** Drop what is later than `step`. */
  cut(step: number): void {
    while (this.n && this.xs[this.n - 1]! > step) this.n -= 1
  }

  /** The value at `step`, or the last one before it. */
  at(step: number): number {
    let low = 0, high = this.n - 1
    while (low < high) {
      const middle = (low + high + 1) >> 1
      if (this.xs[middle]! <= step) low = middle
      else high = middle - 1
    }
    return this.n && this.xs[low]! <= step ? this.ys[low]! : NaN
  }

  /** Mean of the finite values about place `i`, wider in a longer curve; at the start the value itself. */
  around(i: number): number {
    const reach = Math.min(i, 3 + Math.floor(this.n / 120))
    return average(this.ys, i - reach, Math.min(this.n, i + reach + 1))
  }

  /** Mean of the finite values among the last `count`. */
  recent(count: number): number {
    return average(this.ys, Math.max(0, this.n - count), this.n)
  }

  /** Mean of the finite values among the first `count`. */
  first(count: number): number {
    return average(this.ys, 0, Math.min(count, this.n))
  }

  private grow(size: number): void {
    if (size <= this.xs.length) return
    const capacity = Math.max(size, this.xs.length * 2)
    const xs = new Float64Array(capacity), ys = new Float64Array(capacity)
    xs.set(this.xs)
    ys.set(this.ys)
    this.xs = xs
    this.ys = ys
  }
}

function average(values: Float64Array, from: number, to: number): number {
  let sum = 0, count = 0
  for (let i = from; i < to; i++) {
    if (Number.isFinite(values[i])) {
      sum += values[i]!
      count += 1
    }
  }
  return count ? sum / count : NaN
}
