/// One run as the page knows it: its head, curves, commands, alarms. It is filled by a source and then by the stream.

import type {
  Command, Commands, GhostTable, Heartbeat, Job, Knob, RunEvent, RunHead, RunRow, Verdict,
} from './api'
import { Curve } from './curve'
import { Refused, type Source } from './source'

export const FIRST_NAMES = [
  'score/mean', 'score/gold', 'score/holdout', 'kl/mean', 'kl/full', 'beta', 'entropy/per_token', 'length/mean',
  'ppo/clip_fraction', 'ppo/approx_kl', 'value/explained_variance', 'distinct_2', 'tokens/per_second',
  'seconds/generate', 'seconds/reference', 'seconds/score', 'seconds/update', 'seconds/total',
  'eval/score', 'eval/gold', 'eval/kl', 'eval/win_rate',
] as const
const WIDTH = 1200
/** A disk that does not answer just now is asked again after this. */
const AGAIN_MS = 2000

export class RunView {
  row = $state.raw<RunRow | null>(null)
  head = $state.raw<RunHead | null>(null)
  knobs = $state.raw<Knob[]>([])
  heartbeat = $state.raw<Heartbeat | null>(null)
  heardAt = $state(0)
  updateSeconds = $state<number | null>(null)
  verdict = $state.raw<Verdict | null>(null)
  ghost = $state.raw<GhostTable | null>(null)
  commands = $state.raw<Command[]>([])
  schedule = $state.raw<Commands['schedule']>([])
  events = $state.raw<RunEvent[]>([])
  sampleStep = $state<{ probe: number; train: number }>({ probe: -1, train: -1 })
  error = $state<string | null>(null)
  loaded = $state(false)
  /** Grows when curves did; once a frame. */
  version = $state(0)
  readonly curves = new Map<string, Curve>()
  cursor: string | null = null
  private dirty = false
  private asked = new Set<string>()

  constructor(readonly id: string, private readonly source: Source) {}

  private path(rest = ''): string {
    return `api/runs/${encodeURIComponent(this.id)}${rest}`
  }

  async load(): Promise<void> {
    try {
      const head = await this.source.get<RunHead>(this.path())
      this.head = head
      this.row = head.run
      this.knobs = head.knobs
      this.heartbeat = head.heartbeat
      this.heardAt = Date.now()
      this.updateSeconds = head.update_seconds
      this.cursor ??= head.cursor
      await this.want(FIRST_NAMES.filter((name) => head.names.length === 0 || head.names.includes(name)))
      this.error = null
      this.loaded = true
    } catch (error) {
      if (error instanceof Refused && error.status === 503) {
        await new Promise((again) => setTimeout(again, AGAIN_MS))
        return this.load()
      }
      this.error = (error as Error).message
      return
    }
    void this.loadGhost()
    void this.loadVerdict()
    void this.loadCommands()
  }

  /** Fetch curves that are not here yet. */
  async want(names: readonly string[]): Promise<void> {
    const fresh = names.filter((name) => !this.asked.has(name))
    if (!fresh.length) return
    fresh.forEach((name) => this.asked.add(name))
    const columns = await this.source.history(this.id, fresh, WIDTH).catch((error: unknown) => {
      fresh.forEach((name) => this.asked.delete(name))
      throw error
    })
    for (const [name, { steps, values }] of Object.entries(columns)) this.curves.set(name, Curve.of(steps, values))
    this.touch()
  }

  async loadGhost(): Promise<void> {
    const ghost = await this.source.get<GhostTable>(this.path('/ghost')).catch(() => null)
    if (ghost) this.ghost = ghost
  }

  /** A run that had just begun when it was opened has its bank and its first replies by now. */
  heardProbes(): void {
    if (!['bank', 'pooled'].includes(this.ghost?.source ?? '')) void this.loadGhost()
  }

  async loadVerdict(): Promise<void> {
    const verdict = await this.source.get<Verdict>(this.path('/verdict')).catch(() => null)
    if (verdict) this.verdict = verdict
  }

  async loadCommands(): Promise<void> {
    const found = await this.source.get<Commands>(this.path('/commands')).catch(() => null)
    if (!found) return
    this.commands = found.commands
    this.schedule = found.schedule
    if (this.row) this.row = { ...this.row, steered: found.steered }
  }

  async loadEvents(): Promise<void> {
    const found = await this.source.get<{ events: RunEvent[] }>(this.path('/events?after=0'))
      .catch(() => this.source.get<{ events: RunEvent[] }>(this.path('/events')))
      .catch(() => null)
    if (found) this.events = found.events
  }

  async send(kind: string, payload: Record<string, unknown>, actor: string): Promise<Command> {
    const told = await this.source.post<{ id: number; state: 'pending' }>(this.path('/commands'), { kind, payload, actor })
    const command: Command = {
      id: told.id, actor, kind, payload, created: Date.now() / 1000, expires: null,
      state: told.state, step: null, why: '', changes: {},
    }
    this.heardCommands([command], false)
    return command
  }

  fork(body: Record<string, unknown>): Promise<Job> {
    return this.source.post<Job>(this.path('/fork'), body)
  }

  /** Go on with a run that was stopped or killed. */
  goOn(): Promise<Job> {
    return this.source.post<Job>(this.path('/resume'), {})
  }

  // ── what the stream says ──────────────────────────────────────────────────────────────────────────────────────────
  heardUpdates(steps: number[], metrics: Record<string, (number | null)[]>): void {
    for (const [name, values] of Object.entries(metrics)) {
      let curve = this.curves.get(name)
      if (!curve) {
        if (this.asked.has(name) || (this.row?.updates ?? 0) > 0) {
          if (!this.asked.has(name)) continue
        }
        curve = new Curve()
        this.curves.set(name, curve)
        this.asked.add(name)
      }
      for (let i = 0; i < steps.length; i++) curve.push(steps[i]!, values[i] ?? NaN)
    }
    const last = steps.at(-1)
    if (this.row && last !== undefined && last + 1 > this.row.updates) this.row = { ...this.row, updates: last + 1 }
    this.touch()
  }

  heardCommands(fresh: Command[], reload = true): void {
    const known = new Map(this.commands.map((command) => [command.id, command]))
    for (const command of fresh) {
      const before = known.get(command.id)
      if (before && before.state !== 'pending' && command.state === 'pending') continue
      known.set(command.id, command)
    }
    this.commands = [...known.values()].sort((a, b) => a.id - b.id)
    if (reload && fresh.some((command) => command.state === 'applied')) void this.loadCommands()
  }

  heardKnobs(fresh: Record<string, { value: Knob['value']; target: Knob['target'] }>): void {
    this.knobs = this.knobs.map((knob) => (fresh[knob.path] ? { ...knob, ...fresh[knob.path] } : knob))
  }

  heardHeartbeat(state: RunRow['state'], heartbeat: Heartbeat | null, updateSeconds: number | null): void {
    if (this.row) this.row = { ...this.row, state }
    this.heartbeat = heartbeat
    this.heardAt = Date.now()
    this.updateSeconds = updateSeconds
  }

  rewind(after: number): void {
    for (const curve of this.curves.values()) curve.cut(after)
    if (this.row) this.row = { ...this.row, updates: after + 1 }
    this.touch()
    void this.loadCommands()
    void this.loadVerdict()
  }

  // ── what the screens ask ──────────────────────────────────────────────────────────────────────────────────────────
  curve(name: string): Curve {
    void this.version
    return this.curves.get(name) ?? EMPTY
  }

  knob(name: string): Knob | undefined {
    return this.knobs.find((knob) => knob.name === name || knob.path === name)
  }

  /** The β that acts now. */
  get beta(): number {
    const knob = this.knob('beta')
    const curve = this.curve('beta')
    if (typeof knob?.value === 'number') return knob.value
    return curve.length ? curve.last : (this.row?.beta ?? 0)
  }

  get start(): number {
    return this.startOf('score/mean')
  }

  /** What the start is, in words. */
  get startedBy(): string {
    const asked = this.curve('eval/score')
    return asked.length && asked.steps[0] === 0 ? 'the evaluation before the first update' : 'the first update’s replies'
  }

  /** A score of the policy before it moved: of the evaluation at update 0, else of the first update's own replies. */
  startOf(name: string): number {
    const asked = this.curve(name === 'score/mean' ? 'eval/score' : name.replace('score/', 'eval/'))
    return asked.length && asked.steps[0] === 0 ? asked.first(1) : this.curve(name).first(1)
  }

  /** Updates behind "now": few while it moves, as many as in the list of runs once it is over. */
  get window(): number {
    return this.isLive ? 3 : 10
  }

  /** Score gained over the start, a mean of the last few updates. */
  gain(name = 'score/mean', recent = this.window): number {
    return this.curve(name).recent(recent) - this.startOf(name)
  }

  /** Where a score went over the drift: at most 60 places, each a mean of the updates around it. */
  trail(name: string): { gain: number; kl: number }[] {
    const score = this.curve(name), kl = this.curve('kl/mean'), start = this.startOf(name)
    const stride = Math.max(1, Math.ceil(score.length / 60))
    return Array.from({ length: Math.ceil(score.length / stride) }, (_, i) => ({
      gain: score.around(i * stride) - start, kl: Math.max(0, kl.around(i * stride)),
    }))
  }

  get kl(): number {
    return Math.max(0, this.curve('kl/mean').recent(this.window))
  }

  get isLive(): boolean {
    return ['running', 'paused', 'stale', 'slow'].includes(this.row?.state ?? '')
  }

  get isPaused(): boolean {
    return this.row?.state === 'paused'
  }

  get word(): string | null {
    return this.verdict?.verdict ?? this.row?.verdict ?? null
  }

  /** Alarms that last; warnings are none. */
  get alarming(): number {
    return (this.verdict?.alarms ?? []).filter((alarm) => alarm.lasts && alarm.severity === 'alarm').length
  }

  private touch(): void {
    if (this.dirty) return
    this.dirty = true
    const frame = typeof requestAnimationFrame === 'function' && !document.hidden
      ? requestAnimationFrame
      : (go: () => void) => setTimeout(go, 50)
    frame(() => {
      this.dirty = false
      this.version += 1
    })
  }
}

const EMPTY = new Curve()
