/// One EventSource for all runs that are shown. It goes on where it was: nothing is lost, nothing is told twice.
/// A browser opens six connections to a server and no more, for all tabs: one that nobody looks at gives its own back.

/** A tab out of sight listens for so long. */
const HIDDEN_MS = 3000
/** A stream that the server refused, which a browser does not ask for again, is asked for after this. */
const AGAIN_MS = 3000

interface Followed {
  readonly id: string
  cursor: string | null
}

interface Ears {
  heard(event: string, data: Record<string, unknown>): void
  up(): void
  down(): void
}

export interface Stream {
  readonly key: string
  readonly cursor: () => string
  close(): void
}

const EVENTS = [
  'updates', 'evaluations', 'events', 'commands', 'knobs', 'samples', 'heartbeat', 'verdict', 'rewind', 'slow',
  'runs', 'jobs',
]

/** The same stream where the runs are the same; else a new one that goes on at the old one's place. */
export function openStream(before: Stream | null, runs: readonly Followed[], ears: Ears): Stream {
  const key = runs.map((run) => run.id).join(',')
  if (before?.key === key) return before
  before?.close()
  const known = new Map(parts(before?.cursor() ?? ''))
  let cursor = runs.map((run) => known.get(run.id) ?? run.cursor ?? '').filter(Boolean).join(';')
  let source: EventSource | null = null
  let timer = 0
  function listen(): void {
    const query = runs.length
      ? `?runs=${runs.map((run) => encodeURIComponent(run.id)).join(',')}&cursor=${encodeURIComponent(cursor)}`
      : ''
    const made = new EventSource(`api/stream${query}`, { withCredentials: true })
    made.onopen = () => ears.up()
    made.onerror = () => {
      ears.down()
      if (made.readyState === EventSource.CLOSED) timer = window.setTimeout(listen, AGAIN_MS)
    }
    for (const event of EVENTS) {
      made.addEventListener(event, (message: MessageEvent<string>) => {
        if (message.lastEventId) cursor = message.lastEventId
        for (const run of runs) run.cursor = new Map(parts(cursor)).get(run.id) ?? run.cursor
        ears.heard(event, JSON.parse(message.data) as Record<string, unknown>)
      })
    }
    source = made
    look() // a stream may begin where nobody looks
  }
  const rest = (): void => source?.close()
  function look(): void {
    clearTimeout(timer)
    if (document.hidden) timer = window.setTimeout(rest, HIDDEN_MS)
    else if (source?.readyState === EventSource.CLOSED) listen()
  }
  document.addEventListener('visibilitychange', look)
  listen()
  return {
    key,
    cursor: () => cursor,
    close: () => {
      clearTimeout(timer)
      document.removeEventListener('visibilitychange', look)
      rest()
    },
  }
}

/** A cursor of several runs is theirs, joined by `;`, each `run@…`. */
function parts(cursor: string): [string, string][] {
  return cursor.split(';').filter(Boolean).map((part) => [part.slice(0, part.lastIndexOf('@')), part])
}
