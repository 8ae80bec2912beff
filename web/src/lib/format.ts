/// Numbers as people read them.

/** About three significant digits, no exponent between 0.001 and a million; `–` for what is missing. */
export function short(x: number | null | undefined, digits = 3): string {
  if (x === null || x === undefined || Number.isNaN(x)) return '–'
  if (!Number.isFinite(x)) return x > 0 ? '∞' : '−∞'
  const size = Math.abs(x)
  if (size === 0) return '0'
  if (size >= 1e6 || size < 1e-3) return minus(x.toExponential(1))
  if (size >= 1000) return minus(Math.round(x).toLocaleString('en'))
  const places = Math.max(0, Math.min(4, digits - 1 - Math.floor(Math.log10(size))))
  return minus(x.toFixed(places))
}

/** As short as it can be written: 0.2, not 0.200. For what a person set. */
export function plain(x: number | null | undefined): string {
  if (x === null || x === undefined || !Number.isFinite(x)) return short(x)
  return minus(String(Number(x.toPrecision(3))))
}

/** With its sign, always; next to nothing is 0. */
export function signed(x: number | null | undefined, digits = 3): string {
  if (x !== null && x !== undefined && Math.abs(x) < 0.005) return '0.00'
  const text = short(x, digits)
  return x !== null && x !== undefined && x > 0 ? `+${text}` : text
}

/** Seconds as a span that a person says. */
export function span(seconds: number): string {
  if (seconds < 90) return `${Math.round(seconds)} s`
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`
  if (seconds < 129600) return `${Math.round(seconds / 3600)} h`
  return `${Math.round(seconds / 86400)} days`
}

export function percent(x: number): string {
  return Number.isFinite(x) ? `${Math.round(100 * x)} %` : '–'
}

function minus(text: string): string {
  return text.replace('-', '−')
}
