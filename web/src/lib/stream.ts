/// One EventSource for all runs that are shown. It goes on where it was: nothing is lost, nothing is told twice.

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
  const query = runs.length
    ? `?runs=${runs.map((run) => encodeURIComponent(run.id)).join(',')}&cursor=${encodeURIComponent(cursor)}`
    : ''
  const source = new EventSource(`api/stream${query}`, { withCredentials: true })
  source.onopen = () => ears.up()
  source.onerror = () => ears.down()
  for (const event of EVENTS) {
    source.addEventListener(event, (message: MessageEvent<string>) => {
      if (message.lastEventId) cursor = message.lastEventId
      for (const run of runs) run.cursor = new Map(parts(cursor)).get(run.id) ?? run.cursor
      ears.heard(event, JSON.parse(message.data) as Record<string, unknown>)
    })
  }
  return { key, cursor: () => cursor, close: () => source.close() }
}

/** A cursor of several runs is theirs, joined by `;`, each `run@…`. */
function parts(cursor: string): [string, string][] {
  return cursor.split(';').filter(Boolean).map((part) => [part.slice(0, part.lastIndexOf('@')), part])
}
