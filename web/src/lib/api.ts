/// What the server says, as docs/page-api.md has it. Types only.

export interface Session {
  version: string
  may_steer: boolean
  root: string
  selected: string | null
  can_play: boolean
  read_only: boolean
  stale_seconds: number
  faults: string[]
  server_time: number
}

export type RunStateWord =
  | 'running' | 'paused' | 'stale' | 'finished' | 'stopped' | 'failed' | 'not started' | 'unreadable' | 'slow'

export interface RunRow {
  id: string
  name: string
  state: RunStateWord
  phase: string
  silent_seconds: number | null
  model: string | null
  beta: number | null
  updates: number
  steps: number | null
  score: number | null
  kl: number | null
  created: number | null
  steered: number
  fault: string
  lineage: { run: string; step: number } | null
  verdict: string | null
}

export interface Knob {
  path: string
  name: string
  value: number | string | null
  target: number | string | null
  start: number | string | null
  kind: 'number' | 'whole' | 'choice' | 'text'
  min: number | null
  min_exclusive: boolean
  max: number | null
  choices: string[] | null
  nullable: boolean
  slew: number | null
  help: string
  usual: string
}

export interface Heartbeat {
  wall: number
  step: number
  phase: string
  status: string
  silent_seconds: number
  stale: boolean
  paused: boolean
}

export interface RunHead {
  run: RunRow
  cursor: string
  config: Record<string, unknown>
  knobs: Knob[]
  names: string[]
  latest: Record<string, number | null>
  heartbeat: Heartbeat | null
  update_seconds: number | null
  sigma: number | null
  created: number | null
  version: string | null
  source: string | null
  planted_fault: string | null
  crew?: string[]
}

export interface Token {
  text: string
  kl: number | null
  logprob: number | null
  ref_logprob: number | null
  value: number | null
  advantage: number | null
}

export interface Reply {
  response: string
  score: number | null
  kl: number | null
  tokens: Token[]
}

export interface Sample extends Reply {
  step: number
  row: number
  prompt: string
  total: number | null
  scores: Record<string, number | null>
  suspicion: number | null
  why: string[]
  reference: Reply | null
}

export type Split = 'probe' | 'train'

export interface SamplesPage {
  steps: Record<Split, number[]>
  step: number | null
  split: Split
  beta: number | null
  samples: Sample[]
}

export interface Alarm {
  reason: string
  title: string
  kind: string
  severity: string
  step: number
  lasts: boolean
  seen: string
  why: string
  remedy: string
  alike: string
  evidence: Record<string, unknown>
}

export interface Check {
  name: string
  title: string
  kind: string
  verdict: string
  state: 'ok' | 'warning' | 'alarm' | 'over'
  why: string
  last: { step: number | null; seen: string } | null
}

export interface Verdict {
  verdict: string | null
  reason: string
  quiet: boolean
  updates: number
  numbers: Record<string, number | null>
  alarms: Alarm[]
  checks: Check[]
}

export interface RunEvent {
  id: number
  step: number | null
  wall: number
  kind: string
  severity: string
  payload: Record<string, unknown>
}

export interface Command {
  id: number
  actor: string
  kind: string
  payload: Record<string, unknown>
  created: number
  expires: number | null
  state: 'pending' | 'applied' | 'rejected' | 'superseded'
  step: number | null
  why: string
  changes: Record<string, [unknown, unknown, unknown]>
}

export interface Commands {
  commands: Command[]
  schedule: { step: number; knob: string; value: number | string | null }[]
  steered: number
}

export interface BestOf {
  n: number
  gain: number
  kl: number
  gold: number | null
}

export interface GhostTable {
  source: string
  prompts: number
  samples: number
  unit: string
  betas: number[]
  score: number[]
  gain: number[]
  kl: number[]
  ess: number[]
  solid: boolean[]
  start: number
  best_of: BestOf[]
  ceiling: { sigma: number; kl: number[]; gain: number[] }
  caption: string
}

export interface SweepPoint {
  run: string
  beta: number
  /** Score before the policy moved. */
  start: number | null
  score: number
  score_se: number | null
  kl: number
  kl_se: number | null
  gold: number | null
  distinct_2: number | null
  text: string
}

export interface Sweep {
  id: string
  model: string | null
  title: string
  points: SweepPoint[]
}

export interface LearnData {
  exact: {
    betas: number[]
    frontier: { beta: number; score: number; kl: number }[]
    runs: { beta: number; steps: number[]; score: number[]; kl: number[]; regret: number[] }[]
  }
  nano: {
    points: { beta: number; score: number; kl: number; gold: number | null; distinct_2: number | null }[]
    curves: { beta: number; steps: number[]; score: number[]; kl: number[]; gold?: number[] }[]
    texts: {
      prompt: string
      replies: { beta: number; response: string; score: number | null; gold: number | null; kl: number | null }[]
    }[]
  }
  command?: string
}

export interface Metric {
  title: string
  unit: string
  formula: string
  source: string
  healthy: string
  remedy: string
  low: number | null
  high: number | null
}

export interface Failure {
  title: string
  kind: string
  verdict: string
  seen: string
  why: string
  remedy: string
  alike: string
  planted: string
}

export interface Job {
  id: string
  kind: string
  run: string
  state: 'starting' | 'running' | 'done' | 'failed'
  started: number
  exit: number | null
  tail: string[]
}

export type Columns = Record<string, { steps: ArrayLike<number>; values: ArrayLike<number | null> }>
