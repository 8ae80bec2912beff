/// The whole state of the page in the address, behind `#`: it works in a file, and no server ever sees it.

export const SCREENS = ['play', 'samples', 'attached', 'runs', 'learn'] as const
export type Screen = (typeof SCREENS)[number]

export function parse(hash: string): { screen: Screen | null; params: Record<string, string> } {
  const [path = '', query = ''] = hash.replace(/^#?\/?/, '').split('?', 2)
  const screen = SCREENS.find((name) => name === path) ?? null
  return { screen, params: Object.fromEntries(new URLSearchParams(query)) }
}

export function format(screen: Screen, params: Record<string, string | null | undefined>): string {
  const query = new URLSearchParams()
  for (const [key, value] of Object.entries(params)) if (value) query.set(key, value)
  const text = query.toString().replaceAll('%2C', ',').replaceAll('%2F', '/')
  return `#/${screen}${text ? `?${text}` : ''}`
}

class Route {
  screen = $state<Screen>('play')
  params = $state.raw<Record<string, string>>({})

  constructor() {
    this.read()
    if (typeof window !== 'undefined') window.addEventListener('hashchange', () => this.read())
  }

  get(key: string): string | null {
    return this.params[key] ?? null
  }

  /** Change some of the state in place; null takes a key away. */
  set(change: Record<string, string | null>): void {
    const params: Record<string, string | null> = { ...this.params, ...change }
    this.params = Object.fromEntries(Object.entries(params).filter((pair): pair is [string, string] => !!pair[1]))
    history.replaceState(null, '', format(this.screen, this.params))
  }

  /** The address of a screen that keeps the run that is looked at. */
  to(screen: Screen, change: Record<string, string | null> = {}): string {
    const kept = { run: this.get('run'), compare: this.get('compare') }
    return format(screen, { ...kept, ...change })
  }

  private read(): void {
    if (typeof location === 'undefined') return
    const { screen, params } = parse(location.hash)
    this.screen = screen ?? 'play'
    this.params = params
  }
}

export const route = new Route()

/** The token is in a cookie by now: take it out of the address bar, the history and the reader's copy. */
export function forgetToken(): void {
  const url = new URL(location.href)
  if (!url.searchParams.has('token')) return
  url.searchParams.delete('token')
  history.replaceState(null, '', url)
}
