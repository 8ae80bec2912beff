/// One colour, one dash pattern and one name a quantity, wherever it is drawn.

export type QuantityName =
  | 'score' | 'kl' | 'beta' | 'gold' | 'holdout' | 'value' | 'advantage' | 'reference' | 'other'

export interface Quantity {
  /** The custom property that holds its colour. */
  readonly color: string
  /** Line pattern in pixels; empty is solid. Told apart without colour. */
  readonly dash: readonly number[]
  readonly symbol: string
  readonly title: string
  readonly unit: string
  /** One sentence for whoever meets it for the first time. */
  readonly meaning: string
}

export const QUANTITIES: Readonly<Record<QuantityName, Quantity>> = {
  score: {
    color: '--score', dash: [], symbol: 'r', title: 'score', unit: 'σ',
    meaning: 'What the reward model says of a whole reply: one number. It is how high the balloon is.',
  },
  kl: {
    color: '--kl', dash: [7, 3], symbol: 'K', title: 'KL to the reference', unit: 'nats a reply',
    meaning: 'How far the policy has drifted from the frozen SFT checkpoint, summed over the tokens of a reply.',
  },
  beta: {
    color: '--beta', dash: [2, 3], symbol: 'β', title: 'β, the string', unit: 'σ a nat',
    meaning: 'The price of one nat of drift. A large β is a short string, β = 0 is none.',
  },
  gold: {
    color: '--gold', dash: [12, 4], symbol: 'g', title: 'gold', unit: 'σ',
    meaning: 'The judge that the reward model was meant to learn. It is watched and never optimised.',
  },
  holdout: {
    color: '--holdout', dash: [10, 3, 2, 3], symbol: "r′", title: 'hold-out', unit: 'σ',
    meaning: 'A second reward model, of other comparisons. It is watched and never optimised.',
  },
  value: {
    color: '--value', dash: [4, 4], symbol: 'V', title: 'value', unit: 'σ',
    meaning: 'What the value head expects the rest of this reply to earn.',
  },
  advantage: {
    color: '--plus', dash: [5, 2, 1, 2], symbol: 'A', title: 'advantage', unit: 'σ',
    meaning: 'Return minus what was expected: the surprise. Positive tokens are made more probable.',
  },
  reference: {
    color: '--reference', dash: [1, 3], symbol: 'π_ref', title: 'reference', unit: '',
    meaning: 'The frozen SFT checkpoint: the post that the string is tied to.',
  },
  other: { color: '--other', dash: [], symbol: '', title: '', unit: '', meaning: '' },
}

/** Which quantity a logged metric belongs to. */
export function quantityOf(metric: string): QuantityName {
  if (/gold|win_rate/.test(metric)) return 'gold'
  if (/holdout/.test(metric)) return 'holdout'
  if (/^(score|objective|eval\/score|reward)/.test(metric)) return 'score'
  if (/kl/.test(metric)) return 'kl'
  if (metric === 'beta') return 'beta'
  if (/^(value|returns|loss\/value)/.test(metric)) return 'value'
  if (/^advantage/.test(metric)) return 'advantage'
  return 'other'
}
