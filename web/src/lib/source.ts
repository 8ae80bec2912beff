/// Where the data comes from: the server, or the file itself (`tether report`). Both answer the same questions.

import type { Columns, Sample, SamplesPage, Split } from './api'

export class Refused extends Error {
  constructor(readonly status: number, message: string) {
    super(message)
  }
}

export interface Source {
  readonly embedded: boolean
  get<T>(path: string): Promise<T>
  post<T>(path: string, body: unknown): Promise<T>
  history(id: string, names: readonly string[], width: number): Promise<Columns>
  samples(id: string, want: { split: Split; step?: number | null; row?: number | null }): Promise<SamplesPage>
}

interface Embedded {
  responses: Record<string, unknown>
}

/** The source of this page: the data that the file carries, else the server that it came from. */
export function findSource(): Source {
  const node = document.getElementById('tether-data')
  if (node?.textContent) return new FileSource(JSON.parse(node.textContent) as Embedded)
  return new ServerSource()
}

const at = (id: string) => `api/runs/${encodeURIComponent(id)}`

class ServerSource implements Source {
  readonly embedded = false

  async get<T>(path: string): Promise<T> {
    return (await this.ask(path)).json() as Promise<T>
  }

  async post<T>(path: string, body: unknown): Promise<T> {
    const headers = { 'Content-Type': 'application/json' }
    return (await this.ask(path, { method: 'POST', headers, body: JSON.stringify(body) })).json() as Promise<T>
  }

  async history(id: string, names: readonly string[], width: number): Promise<Columns> {
    const query = `names=${names.map(encodeURIComponent).join(',')}&width=${width}`
    return readColumns(await (await this.ask(`${at(id)}/history?${query}`)).arrayBuffer())
  }

  samples(id: string, want: { split: Split; step?: number | null; row?: number | null }): Promise<SamplesPage> {
    const query = new URLSearchParams({ split: want.split })
    if (want.row !== null && want.row !== undefined) query.set('row', String(want.row))
    else if (want.step !== null && want.step !== undefined) query.set('step', String(want.step))
    return this.get(`${at(id)}/samples?${query}`)
  }

  private async ask(path: string, init?: RequestInit): Promise<Response> {
    const answer = await fetch(path, { credentials: 'same-origin', ...init })
    if (answer.ok) return answer
    const told = (await answer.json().catch(() => null)) as { error?: string } | null
    throw new Refused(answer.status, told?.error ?? `the server answered ${answer.status}`)
  }
}

/** The binary form of curves: a JSON header, then float64 columns. */
export function readColumns(buffer: ArrayBuffer): Columns {
  const length = new DataView(buffer).getUint32(4, true)
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length))) as {
    series: { name: string; points: number }[]
  }
  const found: Columns = {}
  let offset = 8 + length
  for (const { name, points } of header.series) {
    const steps = new Float64Array(buffer, offset, points)
    const values = new Float64Array(buffer, offset + 8 * points, points)
    found[name] = { steps, values }
    offset += 16 * points
  }
  return found
}

interface KeptSamples {
  steps: Record<Split, number[]>
  all: Record<Split, Record<string, Sample[]>>
}

export class FileSource implements Source {
  readonly embedded = true

  constructor(private readonly data: Embedded) {}

  get<T>(path: string): Promise<T> {
    const found = this.data.responses[path] ?? this.data.responses[decodeURIComponent(path)]
    if (found === undefined) return Promise.reject(new Refused(404, 'this is not in the report'))
    return Promise.resolve(found as T)
  }

  post<T>(): Promise<T> {
    return Promise.reject(new Refused(409, 'a report is read-only'))
  }

  async history(id: string, names: readonly string[]): Promise<Columns> {
    const { series } = await this.get<{ series: Columns }>(`${at(id)}/history`)
    return Object.fromEntries(Object.entries(series).filter(([name]) => names.includes(name)))
  }

  async samples(
    id: string,
    want: { split: Split; step?: number | null; row?: number | null },
  ): Promise<SamplesPage> {
    const kept = await this.get<KeptSamples>(`${at(id)}/samples`)
    const mine = kept.all[want.split] ?? {}
    const steps = Object.keys(mine).map(Number).sort((a, b) => a - b)
    const told: Record<Split, number[]> = { ...kept.steps, [want.split]: steps }
    if (want.row !== null && want.row !== undefined) {
      const through = steps.flatMap((step) => (mine[step] ?? []).filter((sample) => sample.row === want.row))
      return { steps: told, step: null, split: want.split, beta: null, samples: through }
    }
    const step = want.step !== null && want.step !== undefined && mine[want.step] ? want.step : (steps.at(-1) ?? null)
    return { steps: told, step, split: want.split, beta: null, samples: step === null ? [] : (mine[step] ?? []) }
  }
}
