/// Light or dark: what the system says, or what the reader chose.

export type Choice = 'auto' | 'light' | 'dark'

class Theme {
  choice = $state<Choice>(kept())
  private system = $state(matches('(prefers-color-scheme: dark)'))
  still = $state(matches('(prefers-reduced-motion: reduce)'))

  constructor() {
    listen('(prefers-color-scheme: dark)', (on) => (this.system = on))
    listen('(prefers-reduced-motion: reduce)', (on) => (this.still = on))
  }

  get shown(): 'light' | 'dark' {
    return this.choice === 'auto' ? (this.system ? 'dark' : 'light') : this.choice
  }

  next(): void {
    this.choice = this.shown === 'dark' ? 'light' : 'dark'
    try {
      localStorage.setItem('tether-theme', this.choice)
    } catch {
      /* a file or a private window may keep nothing */
    }
  }
}

function kept(): Choice {
  try {
    const found = localStorage.getItem('tether-theme')
    return found === 'light' || found === 'dark' ? found : 'auto'
  } catch {
    return 'auto'
  }
}

function matches(query: string): boolean {
  return typeof matchMedia === 'function' && matchMedia(query).matches
}

function listen(query: string, heard: (on: boolean) => void): void {
  if (typeof matchMedia === 'function') matchMedia(query).addEventListener('change', (event) => heard(event.matches))
}

export const theme = new Theme()
