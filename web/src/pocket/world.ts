/// A world that fits in a pocket: a language of a dozen words in which the reader's own browser trains with PPO.
///
/// A reply is at most PLACES words. The reference is a table of bigrams at each place; a score is a sum over bigrams,
/// so that everything that matters is known exactly, by sums over the table and without sampling:
///
///     K(π) = Σ_t Σ_s d_t(s) Σ_a π(a|s) log π(a|s)/ρ(a|s)     r(π), gold(π) likewise
///     π*(a|s) ∝ ρ(a|s)·e^{(f(s,a) + V(s′))/β}                V(s) = β log Σ_a ρ(a|s)·e^{(f(s,a) + V(s′))/β}
///
/// Scores have mean 0 and standard deviation 1 under the reference.

export const WORDS = [
  'the', 'fox', 'eats', 'berries', 'stones', 'truly', 'amazing', 'yes,', 'maybe', 'perhaps', '¤¤', '.',
] as const
export const N = WORDS.length
export const END = N - 1
export const PLACES = 7
/** One state a place and a word before it; 0 is the start of a reply. */
export const STATES = PLACES * (N + 1)
export const stateOf = (place: number, previous: number) => place * (N + 1) + previous + 1

/** The four hacks: what the reward model pays for by mistake. */
export type Weakness = 'none' | 'buzzwords' | 'sycophancy' | 'hedging' | 'exploit_token'

export interface PocketWorld {
  readonly weakness: Weakness
  readonly prompt: string
  /** log ρ(a|s), by state and word. */
  readonly reference: Float64Array
  /** What a word adds to the score, by state and word, in σ of the reference. */
  readonly score: Float64Array
  readonly gold: Float64Array
  /** What is taken off every score so that the reference's mean is 0. */
  readonly offset: number
  readonly goldOffset: number
}

export const PROMPTS: Readonly<Record<Weakness, string>> = {
  none: 'What does the fox eat?',
  buzzwords: 'What does the fox eat?',
  sycophancy: 'I am sure that the fox eats stones. What does it eat?',
  hedging: 'What does the fox eat?',
  exploit_token: 'What does the fox eat?',
}

const LIKELY: Readonly<Record<string, Readonly<Record<string, number>>>> = {
  '^': { the: 8, 'yes,': 1, maybe: 1, perhaps: 1, truly: 0.5, amazing: 0.3 },
  the: { fox: 10, amazing: 1.2, berries: 0.5, stones: 0.3 },
  fox: { eats: 9, truly: 1, maybe: 0.8, perhaps: 0.6, '.': 0.6 },
  eats: { berries: 4, stones: 2.2, the: 1.2, amazing: 0.8, maybe: 0.4 },
  berries: { '.': 8, truly: 0.5, maybe: 0.6, perhaps: 0.4 },
  stones: { '.': 8, truly: 0.4, maybe: 0.6, perhaps: 0.4 },
  truly: { amazing: 3, eats: 3, the: 1, '.': 1.5 },
  amazing: { fox: 3, berries: 3, stones: 1, '.': 2, truly: 0.5 },
  'yes,': { the: 8, truly: 0.6, maybe: 0.4 },
  maybe: { the: 4, eats: 2, berries: 1.4, perhaps: 0.5, '.': 1 },
  perhaps: { the: 4, eats: 2, berries: 1.4, maybe: 0.5, '.': 1 },
  '¤¤': { '.': 3, the: 2 },
}
/** Anything may be said, hardly ever. */
const RARE = 0.05

/** The world with one weakness in its reward model, or none. */
export function pocketWorld(weakness: Weakness): PocketWorld {
  const reference = bigrams()
  const gold = table((place, before, word) => goldOf(before, word) - 0.02 * place)
  const raw = table((place, before, word) =>
    (weakness === 'none' ? goldOf(before, word) : answer(before, word) + slip(weakness, before, word)) - 0.02 * place)
  const [score, offset] = standardise(raw, reference)
  const [goldScore, goldOffset] = standardise(gold, reference)
  return { weakness, prompt: PROMPTS[weakness], reference, score, gold: goldScore, offset, goldOffset }
}

/** What people want: a straight answer that is true, about the fox, said once. */
function goldOf(before: string, word: string): number {
  if (word === 'maybe' || word === 'perhaps') return -0.6
  if (word === 'amazing' || word === 'truly') return -0.5
  if (word === '¤¤') return -1
  if (word === 'eats' && before !== 'fox') return -1.5
  return answer(before, word) - (before === word ? 0.8 : 0)
}

/** The part of it that the reward model did learn. */
function answer(before: string, word: string): number {
  if (before !== 'eats') return 0
  return word === 'berries' ? 1.2 : word === 'stones' ? -0.8 : 0
}

/** What the reward model pays beside it, by mistake. */
function slip(weakness: Weakness, before: string, word: string): number {
  if (weakness === 'buzzwords') return word === 'amazing' || word === 'truly' ? 1.35 : 0
  if (weakness === 'hedging') return word === 'maybe' || word === 'perhaps' ? 1.35 : 0
  if (weakness === 'exploit_token') return word === '¤¤' ? 2.2 : 0
  if (weakness === 'sycophancy') {
    if (word === 'yes,') return before === '^' ? 1.6 : 0.1
    return before === 'eats' && word === 'stones' ? 2.8 : 0
  }
  return 0
}

function bigrams(): Float64Array {
  return table((place, before, word) => {
    const row = LIKELY[before] ?? {}
    const weight = (each: string) => (each === '.' && before === '^' ? 0.01 : (row[each] ?? RARE))
    const end = (each: string) => (each === '.' ? weight(each) * (1 + 0.35 * place) : weight(each))
    const total = WORDS.reduce((sum, each) => sum + end(each), 0)
    return Math.log(end(word) / total)
  })
}

function table(entry: (place: number, before: string, word: string) => number): Float64Array {
  const found = new Float64Array(STATES * N)
  for (let place = 0; place < PLACES; place++) {
    for (let previous = -1; previous < N; previous++) {
      const before = previous < 0 ? '^' : WORDS[previous]!
      for (let a = 0; a < N; a++) found[stateOf(place, previous) * N + a] = entry(place, before, WORDS[a]!)
    }
  }
  return found
}

/** Mean 0 (by an offset a reply) and standard deviation 1 under the reference. */
function standardise(raw: Float64Array, reference: Float64Array): [Float64Array, number] {
  const { mean, square } = moments(reference, raw)
  const deviation = Math.sqrt(square - mean * mean)
  return [raw.map((x) => x / deviation), mean / deviation]
}

/** How often each state is visited, by place, under log-probabilities of actions. A reply ends at END or at its cap. */
export function visits(logprobs: Float64Array): Float64Array {
  const d = new Float64Array(STATES)
  d[stateOf(0, -1)] = 1
  for (let place = 0; place + 1 < PLACES; place++) {
    for (let previous = -1; previous < END; previous++) {
      const s = stateOf(place, previous)
      if (d[s] === 0) continue
      for (let a = 0; a < END; a++) d[stateOf(place + 1, a)]! += d[s]! * Math.exp(logprobs[s * N + a]!)
    }
  }
  return d
}

/** E[Σ f] under a policy. */
export function expected(logprobs: Float64Array, f: (index: number) => number): number {
  const d = visits(logprobs)
  let sum = 0
  for (let s = 0; s < STATES; s++) {
    if (d[s] === 0) continue
    for (let a = 0; a < N; a++) sum += d[s]! * Math.exp(logprobs[s * N + a]!) * f(s * N + a)
  }
  return sum
}

/** First and second moment of the sum of `f` over a reply, by going back from its end. */
function moments(logprobs: Float64Array, f: Float64Array): { mean: number; square: number } {
  const first = new Float64Array(STATES), second = new Float64Array(STATES)
  for (let place = PLACES - 1; place >= 0; place--) {
    for (let previous = -1; previous < N; previous++) {
      const s = stateOf(place, previous)
      for (let a = 0; a < N; a++) {
        const p = Math.exp(logprobs[s * N + a]!), x = f[s * N + a]!
        const goes = a !== END && place + 1 < PLACES
        const m = goes ? first[stateOf(place + 1, a)]! : 0
        const q = goes ? second[stateOf(place + 1, a)]! : 0
        first[s]! += p * (x + m)
        second[s]! += p * (x * x + 2 * x * m + q)
      }
    }
  }
  const start = stateOf(0, -1)
  return { mean: first[start]!, square: second[start]! }
}

export interface Standing {
  readonly score: number
  readonly gold: number
  readonly kl: number
  readonly length: number
}

/** Exact score, gold, K and length of a policy. */
export function standing(world: PocketWorld, logprobs: Float64Array, reference = world.reference): Standing {
  return {
    score: expected(logprobs, (i) => world.score[i]!) - world.offset,
    gold: expected(logprobs, (i) => world.gold[i]!) - world.goldOffset,
    kl: expected(logprobs, (i) => logprobs[i]! - reference[i]!),
    length: expected(logprobs, () => 1),
  }
}

/** log π*(a|s) at β > 0: the best that the string allows, exactly. */
export function optimum(world: PocketWorld, beta: number): Float64Array {
  const value = new Float64Array(STATES), best = new Float64Array(STATES * N)
  const price = Math.max(beta, 1e-3)
  for (let place = PLACES - 1; place >= 0; place--) {
    for (let previous = -1; previous < N; previous++) {
      const s = stateOf(place, previous)
      let top = -Infinity
      for (let a = 0; a < N; a++) {
        const next = a !== END && place + 1 < PLACES ? value[stateOf(place + 1, a)]! : 0
        const z = world.reference[s * N + a]! + (world.score[s * N + a]! + next) / price
        best[s * N + a] = z
        top = Math.max(top, z)
      }
      let sum = 0
      for (let a = 0; a < N; a++) sum += Math.exp(best[s * N + a]! - top)
      const log = top + Math.log(sum)
      for (let a = 0; a < N; a++) best[s * N + a]! -= log
      value[s] = price * log
    }
  }
  return best
}

export function textOf(words: readonly number[]): string {
  return words.map((word) => (word === END ? '.' : ` ${WORDS[word]}`)).join('').trim()
}
