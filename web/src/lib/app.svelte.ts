/// The page's one state: session, list of runs, jobs, catalogues, the runs that are open, and the stream behind them.

import type { Failure, Job, LearnData, Metric, RunRow, Session, Sweep } from './api'
import { route } from './route.svelte'
import { RunView } from './run.svelte'
import { findSource, Refused, type Source } from './source'
import { openStream, type Stream } from './stream'

class App {
  source!: Source
  session = $state.raw<Session | null>(null)
  rows = $state.raw<RunRow[]>([])
  jobs = $state.raw<Job[]>([])
  sweeps = $state.raw<Sweep[]>([])
  metrics = $state.raw<Record<string, Metric>>({})
  failures = $state.raw<Record<string, Failure>>({})
  learn = $state.raw<LearnData | null>(null)
  open = $state.raw<Record<string, RunView>>({})
  connection = $state<'loading' | 'live' | 'lost' | 'file' | 'refused'>('loading')
  error = $state<string | null>(null)
  said = $state('')
  helpOpen = $state(false)
  readonly actor = `page-${Math.random().toString(36).slice(2, 8)}`
  private stream: Stream | null = null

  async start(): Promise<void> {
    this.source = findSource()
    try {
      this.session = await this.source.get<Session>('api/session')
      await this.loadRows()
    } catch (error) {
      this.connection = 'refused'
      const refused = error instanceof Refused && error.status === 401
      this.error = refused
        ? 'This page does not know you. Open the address that `tether ui` printed: it ends in ?token=…'
        : `The server does not answer: ${(error as Error).message}`
      return
    }
    this.connection = this.source.embedded ? 'file' : 'live'
    void this.loadRest()
  }

  /** May this page change a run at all? */
  get maySteer(): boolean {
    return !!this.session?.may_steer && !this.session.read_only && !this.source.embedded
  }

  get runId(): string | null {
    const wanted = route.get('run')
    if (wanted && this.rows.some((row) => row.id === wanted)) return wanted
    const chosen = this.session?.selected
    if (chosen && this.rows.some((row) => row.id === chosen)) return chosen
    return (this.rows.find((row) => row.state === 'running') ?? this.rows[0])?.id ?? null
  }

  /** Ids of the runs beside it. */
  get compared(): string[] {
    const known = new Set(this.rows.map((row) => row.id))
    return (route.get('compare') ?? '').split(',').filter((id) => known.has(id))
  }

  get run(): RunView | null {
    return this.runId ? (this.open[this.runId] ?? null) : null
  }

  /** Open these runs and follow them; runs that are open stay so. */
  show(ids: readonly string[]): void {
    const fresh = ids.filter((id) => !this.open[id])
    if (fresh.length) {
      const views = fresh.map((id) => new RunView(id, this.source))
      this.open = { ...this.open, ...Object.fromEntries(views.map((view) => [view.id, view])) }
      for (const view of views) void view.load().then(() => this.follow()) // a slow one holds up no other
    } else this.follow()
  }

  say(sentence: string): void {
    this.said = sentence
  }

  async play(options: Record<string, unknown>): Promise<Job> {
    return this.source.post<Job>('api/play', options)
  }

  async loadRows(): Promise<void> {
    const { runs } = await this.source.get<{ runs: RunRow[] }>('api/runs')
    this.rows = runs
    for (const row of runs) {
      const view = this.open[row.id]
      if (view) view.row = { ...row, updates: Math.max(row.updates, view.row?.updates ?? 0) }
    }
  }

  private async loadRest(): Promise<void> {
    const get = <T>(path: string) => this.source.get<T>(path).catch(() => null)
    const [metrics, failures, sweeps, learn, jobs] = await Promise.all([
      get<Record<string, Metric>>('api/metrics'),
      get<Record<string, Failure>>('api/failures'),
      get<{ sweeps: Sweep[] }>('api/sweeps'),
      get<LearnData>('api/learn'),
      get<{ jobs: Job[] }>('api/jobs'),
    ])
    this.metrics = metrics ?? {}
    this.failures = failures ?? {}
    this.sweeps = sweeps?.sweeps ?? []
    this.learn = learn
    this.jobs = jobs?.jobs ?? []
  }

  private follow(): void {
    if (this.source.embedded) return
    const wanted = [this.runId, ...this.compared].filter((id): id is string => !!id).slice(0, 16)
    const views = wanted.map((id) => this.open[id]).filter((view): view is RunView => !!view?.cursor)
    this.stream = openStream(this.stream, views, {
      heard: (event, data) => this.heard(event, data),
      up: () => {
        if (this.connection === 'lost') this.say('The server answers again.')
        this.connection = 'live'
      },
      down: () => {
        if (this.connection === 'live') this.say('the server is away; training is not. Trying again …')
        this.connection = 'lost'
      },
    })
  }

  private heard(event: string, data: Record<string, unknown>): void {
    if (event === 'runs') void this.loadRows().catch(() => undefined)
    if (event === 'jobs') this.jobs = data['jobs'] as Job[]
    const view = this.open[data['run'] as string]
    if (!view) return
    hear(view, event, data)
  }
}

/** One message of the stream, to the run that it is of. */
function hear(view: RunView, event: string, data: Record<string, unknown>): void {
  const of = <T>(key: string) => data[key] as T
  switch (event) {
    case 'updates':
    case 'evaluations':
      view.heardUpdates(of('steps'), of('metrics'))
      break
    case 'events':
      view.events = [...view.events, ...of<typeof view.events>('events')]
      if (of<typeof view.events>('events').some((event) => event.severity !== 'info')) void view.loadVerdict()
      break
    case 'commands':
      view.heardCommands(of('commands'))
      break
    case 'knobs':
      view.heardKnobs(of('knobs'))
      break
    case 'samples':
      view.sampleStep = { ...view.sampleStep, [of<string>('split')]: of<number>('step') }
      if (of<string>('split') === 'probe') view.heardProbes()
      break
    case 'heartbeat':
      view.heardHeartbeat(of('state'), of('heartbeat'), of('update_seconds'))
      break
    case 'verdict':
      void view.loadVerdict()
      break
    case 'rewind':
      view.rewind(of('after'))
      break
  }
}

export const app = new App()
