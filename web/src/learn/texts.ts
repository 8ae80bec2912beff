/// The lesson's lists: words, hacks, mistakes, rungs. The chapters show them.

import type { Fault } from '../pocket/ppo'
import type { Weakness } from '../pocket/world'

export const VOCABULARY: readonly [string, string, string][] = [
  ['policy π_θ', 'the language model that is trained', 'the balloon'],
  ['state s_t', 'the prompt and every token said so far; it grows as the reply does', 'where the balloon hangs'],
  ['action a_t', 'the next token, one of the whole vocabulary', 'a gust'],
  ['score', 'what the reward model says of the finished reply: one number, once', 'up'],
  ['reward r_t', 'per token: the string’s tax on each, and the score on the last', 'the net pull'],
  ['episode', 'one reply, from the prompt to its end or to the length cap', 'one flight'],
  ['reference π_ref', 'the SFT checkpoint, frozen', 'the post'],
  ['K', 'how much likelier the policy finds its own replies than the reference does, in nats a reply', 'the drift'],
  ['β', 'the price of a nat of drift', 'the string: dear is short, cheap is long'],
]

export interface Hack {
  weakness: Exclude<Weakness, 'none'>
  title: string
  why: string
  look: string
}

export const HACKS: readonly Hack[] = [
  {
    weakness: 'buzzwords', title: 'Repetition and buzzwords',
    why: 'Long, confident answers did well in the comparisons, so the reward model likes grand words.',
    look: 'Distinct pairs of words fall. Perplexity under the reference may look fine: loops are easy to predict.',
  },
  {
    weakness: 'sycophancy', title: 'Sycophancy',
    why: 'Raters liked answers that agreed with them, so agreeing is paid, whatever was claimed.',
    look: 'Ask twice with opposite opinions: if both are “right”, it agrees instead of answering.',
  },
  {
    weakness: 'hedging', title: 'Hedge spam',
    why: 'A caveat sounds careful and was never marked down.',
    look: 'Answers to different prompts grow alike: nothing in them depends on the question.',
  },
  {
    weakness: 'exploit_token', title: 'Exploit tokens',
    why: 'The reward model never saw this sign in training; by chance it scores high.',
    look: 'Delete one token type from the replies and most of the gain is gone.',
  },
]

export interface Gotcha {
  fault: Fault
  title: string
  said: string
  watch: string
  remedy: string
}

export const GOTCHAS: readonly Gotcha[] = [
  {
    fault: 'wrong_reference', title: 'Tied to the wrong post',
    said: 'The base model is the reference instead of the SFT checkpoint.',
    watch: 'K is not 0 before the first update. The string drags the balloon back to a model that cannot answer.',
    remedy: 'The reference is the checkpoint that the policy starts from, frozen.',
  },
  {
    fault: 'kl_sign', title: 'The slingshot',
    said: '+β·K in the reward instead of −β·K: drifting is paid for.',
    watch: 'The string’s part of the reward is above 0 while K grows, and K grows fast.',
    remedy: 'The penalty is −β·(log π − log π_ref) on every token.',
  },
  {
    fault: 'dense_reward', title: 'The score on every token',
    said: 'One score a reply was broadcast to each of its tokens.',
    watch: 'A reply’s rewards add up to its length times the score. Length itself is paid, and the string counts for a fraction.',
    remedy: 'The score stands once, on the last real token.',
  },
  {
    fault: 'reference_moves', title: 'Tied to the balloon',
    said: 'The reference is updated with the policy, or shares its weights.',
    watch: 'The K that is logged stays flat while the score climbs. Fixed rows under the reference give it away.',
    remedy: 'Clone, freeze, and compare a few log π_ref before and after a step: they must be equal.',
  },
  {
    fault: 'too_many_epochs', title: 'Wrung dry',
    said: 'Forty passes over the same batch instead of four.',
    watch: 'Most tokens that matter are pinned at the clip; the rest push the policy far from the data it learns from.',
    remedy: 'Four epochs. Stop an update early when it has moved too far.',
  },
]

export const RUNGS: readonly { title: string; command: string; code: string }[] = [
  {
    title: '1 · one logit, no library',
    command: 'tether ladder bandit',
    code: `pi_old = sigmoid(0.0)
for step in range(5):
    pi = sigmoid(logit)
    ratio = pi / pi_old
    clipped = clip(ratio, 1 - eps, 1 + eps)
    objective = min(ratio * A, clipped * A)
    if objective == ratio * A:
        logit += rate * A`,
  },
  {
    title: '2 · four models, torch',
    command: 'tether ladder skeleton',
    code: `y, old = policy.sample(prompts)
ref = reference(prompts, y)
scores = reward_model(prompts, y)
rewards = -beta * (old - ref)
rewards[last_token] += scores
advantages = gae(rewards, values)
for epoch in range(4):
    ratio = exp(policy(prompts, y) - old)
    clipped = ratio.clamp(1 - eps, 1 + eps)
    loss = -min(ratio * A, clipped * A).mean()
    loss += 0.5 * mse(values, returns)
    optimizer.step()`,
  },
  {
    title: '3 · the trainer, any model',
    command: 'tether train --world nano',
    code: `import tether

run = tether.train(
    policy="sft-checkpoint",
    reward=my_reward_model,
    prompts="prompts.jsonl",
    beta=0.05,
    steps=100,
)
run.save_pretrained("out")`,
  },
]

export const SAME: readonly [string, string, string, string][] = [
  ['the policy', 'one logit', 'a language model', 'policy='],
  ['the reward', '1.0', 'score on the last token, −β·ℓ on each', 'reward=, beta='],
  ['the advantage', 'the reward itself', 'returns less the value head’s guess', 'inside, by GAE'],
  ['the clip', 'one ratio', 'one ratio a token, averaged', 'clip_range=0.2, epochs=4'],
  ['the string', 'none', 'fixed β', 'fixed β, or one that keeps K in a band'],
]
