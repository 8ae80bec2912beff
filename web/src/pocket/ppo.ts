/// PPO on the pocket world, whole: sample → score → rewards → advantages → clipped epochs. With the lesson's five
/// mistakes, each of which can be planted where it would really be, and the checks that see them.

import { END, expected, N, PLACES, standing, STATES, stateOf, type PocketWorld, type Standing } from './world'

export const FAULTS = ['wrong_reference', 'kl_sign', 'dense_reward', 'reference_moves', 'too_many_epochs'] as const
export type Fault = (typeof FAULTS)[number]

export interface Settings {
  beta: number
  fault: Fault | null
  batch: number
  epochs: number
  clip: number
  rate: number
  seed: number
}

export const DEFAULTS: Settings = { beta: 0.25, fault: null, batch: 96, epochs: 4, clip: 0.2, rate: 0.05, seed: 1 }
const LAMBDA = 0.95
const MANY_EPOCHS = 40
/** A healthy update stays below 0.01 nats a token and clips a tenth of them at most. */
const MAX_APPROX_KL = 0.05
const MAX_CLIPPED = 0.3
const ROUND_OFF = 1e-9

export interface Reply {
  words: number[]
  states: number[]
  logprobs: number[]
  refLogprobs: number[]
  values: number[]
  rewards: number[]
  advantages: number[]
  returns: number[]
  score: number
  /** Σ log π − log π_ref. */
  kl: number
}

export interface Seen {
  reason: Fault
  step: number
  seen: string
}

export interface Told {
  step: number
  beta: number
  /** Exact, not sampled. */
  exact: Standing
  nonScore: number
  approxKl: number
  clipped: number
  valueError: number
  sample: Reply
}

/** A small generator with a seed (mulberry32): the same seed gives the same run on every machine. */
export function generator(seed: number): () => number {
  let state = seed >>> 0
  return () => {
    state = (state + 0x6d2b79f5) >>> 0
    let t = state
    t = Math.imul(t ^ (t >>> 15), t | 1)
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61)
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296
  }
}

/** log softmax of each row. */
export function logSoftmax(logits: Float64Array): Float64Array {
  const found = new Float64Array(logits.length)
  for (let s = 0; s < STATES; s++) {
    let top = -Infinity, sum = 0
    for (let a = 0; a < N; a++) top = Math.max(top, logits[s * N + a]!)
    for (let a = 0; a < N; a++) sum += Math.exp(logits[s * N + a]! - top)
    const log = top + Math.log(sum)
    for (let a = 0; a < N; a++) found[s * N + a] = logits[s * N + a]! - log
  }
  return found
}

/** Adam, written out. */
class Adam {
  private m: Float64Array
  private v: Float64Array
  private t = 0

  constructor(private readonly x: Float64Array, private readonly rate: number) {
    this.m = new Float64Array(x.length)
    this.v = new Float64Array(x.length)
  }

  descend(gradient: Float64Array): void {
    this.t += 1
    const fix1 = 1 - 0.9 ** this.t, fix2 = 1 - 0.999 ** this.t
    for (let i = 0; i < this.x.length; i++) {
      this.m[i] = 0.9 * this.m[i]! + 0.1 * gradient[i]!
      this.v[i] = 0.999 * this.v[i]! + 0.001 * gradient[i]! ** 2
      this.x[i]! -= (this.rate * (this.m[i]! / fix1)) / (Math.sqrt(this.v[i]! / fix2) + 1e-6)
    }
  }
}

export class PocketTrainer {
  step = 0
  readonly settings: Settings
  readonly seen: Seen[] = []
  private readonly logits: Float64Array
  private reference: Float64Array
  private readonly values = new Float64Array(STATES)
  private readonly policyAdam: Adam
  private readonly valueAdam: Adam
  private readonly uniform: () => number
  private readonly probe: number
  private far: boolean[] = []

  constructor(readonly world: PocketWorld, settings: Partial<Settings> = {}) {
    this.settings = { ...DEFAULTS, ...settings }
    this.logits = world.reference.slice()
    this.reference = this.settings.fault === 'wrong_reference' ? baseModel(world) : world.reference.slice()
    this.policyAdam = new Adam(this.logits, this.settings.rate)
    this.valueAdam = new Adam(this.values, 3 * this.settings.rate)
    this.uniform = generator(this.settings.seed)
    this.probe = sum(this.reference)
    this.checkStart()
  }

  /** log π(a|s) as it stands. */
  get logprobs(): Float64Array {
    return logSoftmax(this.logits)
  }

  /** Drift from the SFT checkpoint, exactly, whatever the string is tied to. */
  standing(): Standing {
    return standing(this.world, this.logprobs)
  }

  /** One update. */
  update(): Told {
    const { beta } = this.settings
    const logprobs = this.logprobs
    const replies = Array.from({ length: this.settings.batch }, () => this.sample(logprobs))
    for (const reply of replies) this.reward(reply, beta)
    this.checkRewards(replies, beta)
    for (const reply of replies) this.estimate(reply)
    whiten(replies)
    const { approxKl, clipped, valueError } = this.improve(replies)
    if (this.settings.fault === 'reference_moves') this.reference = this.logprobs
    this.checkProbe()
    this.checkDistance(approxKl, clipped)
    this.step += 1
    const nonScore = mean(replies.map((reply) => sum(reply.rewards) - reply.score))
    return { step: this.step - 1, beta, exact: this.standing(), nonScore, approxKl, clipped, valueError, sample: replies[0]! }
  }

  /** One reply of the policy, drawn word by word. */
  sample(logprobs: Float64Array): Reply {
    const reply: Reply = {
      words: [], states: [], logprobs: [], refLogprobs: [], values: [], rewards: [], advantages: [], returns: [],
      score: -this.world.offset, kl: 0,
    }
    let previous = -1
    for (let place = 0; place < PLACES && previous !== END; place++) {
      const s = stateOf(place, previous)
      let left = this.uniform(), a = 0
      for (; a < N - 1; a++) {
        left -= Math.exp(logprobs[s * N + a]!)
        if (left < 0) break
      }
      reply.words.push(a)
      reply.states.push(s)
      reply.logprobs.push(logprobs[s * N + a]!)
      reply.refLogprobs.push(this.reference[s * N + a]!)
      reply.values.push(this.values[s]!)
      reply.score += this.world.score[s * N + a]!
      reply.kl += logprobs[s * N + a]! - this.reference[s * N + a]!
      previous = a
    }
    return reply
  }

  /** R_t = −β·ℓ_t, and the score once, on the last token. Here three of the mistakes are made. */
  private reward(reply: Reply, beta: number): void {
    const sign = this.settings.fault === 'kl_sign' ? 1 : -1
    const last = reply.words.length - 1
    reply.rewards = reply.words.map((_, t) => {
      const string = sign * beta * (reply.logprobs[t]! - reply.refLogprobs[t]!)
      return string + (t === last || this.settings.fault === 'dense_reward' ? reply.score : 0)
    })
  }

  /** GAE from the end to the start: δ_t = R_t + V_{t+1} − V_t, A_t = δ_t + λ·A_{t+1}. */
  private estimate(reply: Reply): void {
    let next = 0, after = 0
    for (let t = reply.words.length - 1; t >= 0; t--) {
      next = reply.rewards[t]! + after - reply.values[t]! + LAMBDA * next
      after = reply.values[t]!
      reply.advantages[t] = next
      reply.returns[t] = next + reply.values[t]!
    }
  }

  private improve(replies: Reply[]): { approxKl: number; clipped: number; valueError: number } {
    const epochs = this.settings.fault === 'too_many_epochs' ? MANY_EPOCHS : this.settings.epochs
    let outcome = { approxKl: 0, clipped: 0, valueError: 0 }
    for (let epoch = 0; epoch < epochs; epoch++) outcome = this.epoch(replies)
    return outcome
  }

  /** One pass: the gradient of −min(ratio·A, clip(ratio)·A), and of the value's squared error. */
  private epoch(replies: Reply[]): { approxKl: number; clipped: number; valueError: number } {
    const logprobs = this.logprobs
    const policy = new Float64Array(STATES * N), value = new Float64Array(STATES)
    let tokens = 0, clipped = 0, approxKl = 0, valueError = 0
    for (const reply of replies) {
      for (let t = 0; t < reply.words.length; t++) {
        const s = reply.states[t]!, a = reply.words[t]!, A = reply.advantages[t]!
        const log = logprobs[s * N + a]! - reply.logprobs[t]!
        const ratio = Math.exp(log)
        const pinned = A > 0 ? ratio > 1 + this.settings.clip : ratio < 1 - this.settings.clip
        tokens += 1
        approxKl += ratio - 1 - log
        if (pinned) clipped += 1
        else for (let b = 0; b < N; b++) {
          policy[s * N + b]! -= A * ratio * ((a === b ? 1 : 0) - Math.exp(logprobs[s * N + b]!))
        }
        const error = this.values[s]! - reply.returns[t]!
        value[s]! += error
        valueError += error * error
      }
    }
    this.policyAdam.descend(policy.map((x) => x / tokens))
    this.valueAdam.descend(value.map((x) => x / tokens))
    return { approxKl: approxKl / tokens, clipped: clipped / tokens, valueError: valueError / tokens }
  }

  // ── the checks: identities of every right run, and one guard ──────────────────────────────────────────────────────
  private checkStart(): void {
    const drift = expected(this.logprobs, (i) => this.world.reference[i]! - this.reference[i]!)
    if (Math.abs(drift) > ROUND_OFF) {
      this.alarm('wrong_reference', `K is ${drift.toFixed(1)} nats before the first update, where it must be 0`)
    }
  }

  private checkRewards(replies: Reply[], beta: number): void {
    const k = mean(replies.map((reply) => reply.kl))
    const dense = replies.find((reply) => {
      const carriers = reply.rewards.filter(
        (reward, t) => Math.abs(Math.abs(reward) - Math.abs(beta * (reply.logprobs[t]! - reply.refLogprobs[t]!))) > ROUND_OFF,
      )
      return carriers.length > 1
    })
    if (dense) {
      const total = sum(dense.rewards), wanted = dense.score - beta * dense.kl
      this.alarm('dense_reward', `a reply's rewards add up to ${total.toFixed(2)}, its score minus β·K is ${wanted.toFixed(2)}`)
      return
    }
    const pull = mean(replies.map((reply) => sum(reply.rewards) - reply.score))
    if (Math.abs(pull + beta * k) > ROUND_OFF) {
      const said = `the string's part of the reward is ${pull.toFixed(3)}, it must be −β·K = ${(-beta * k).toFixed(3)}`
      this.alarm('kl_sign', said)
    }
  }

  private checkProbe(): void {
    const moved = Math.abs(sum(this.reference) - this.probe)
    if (moved > ROUND_OFF) this.alarm('reference_moves', `log π_ref on fixed rows moved by ${moved.toPrecision(2)} in one update`)
  }

  private checkDistance(approxKl: number, clipped: number): void {
    this.far = [...this.far.slice(-4), approxKl > MAX_APPROX_KL || clipped > MAX_CLIPPED]
    if (this.far.filter(Boolean).length >= 3) {
      const said = `${Math.round(100 * clipped)} % of the tokens are at the clip, one update moved ${approxKl.toFixed(2)} nats a token`
      this.alarm('too_many_epochs', said)
    }
  }

  private alarm(reason: Fault, seen: string): void {
    if (!this.seen.some((alarm) => alarm.reason === reason)) this.seen.push({ reason, step: this.step, seen })
  }
}

/** The model before it was taught to answer: the same words, hardly any grammar. */
function baseModel(world: PocketWorld): Float64Array {
  return logSoftmax(world.reference.map((x) => 0.35 * x))
}

function whiten(replies: Reply[]): void {
  const all = replies.flatMap((reply) => reply.advantages)
  const m = mean(all)
  const deviation = Math.sqrt(mean(all.map((x) => (x - m) ** 2))) + 1e-8
  for (const reply of replies) reply.advantages = reply.advantages.map((x) => (x - m) / deviation)
}

function sum(x: ArrayLike<number>): number {
  let total = 0
  for (let i = 0; i < x.length; i++) total += x[i]!
  return total
}

const mean = (x: ArrayLike<number>) => sum(x) / x.length
