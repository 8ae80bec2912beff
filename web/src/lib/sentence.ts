/// How a run stands, in one sentence, for the live region and for the eye.

import { short, signed } from './format'
import type { RunView } from './run.svelte'

export function sentence(run: RunView): string {
  const beta = run.beta
  if (!run.row?.updates) return run.isLive ? 'Waiting for the first update: the models are loaded and the start is measured.' : 'No update yet.'
  const string = beta <= 0 ? 'there is no string' : `the string costs ${short(beta * run.kl, 2)}`
  return (
    `Update ${run.row?.updates ?? 0}: the score is ${signed(run.gain())} from its start, the drift is ${short(run.kl)} nats, ` +
    `${string}. ${run.word ? `Verdict: ${run.word.toLowerCase()}.` : ''}`
  )
}
