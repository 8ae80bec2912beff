import { describe, expect, it } from 'vitest'
import { fromScores, fromTable } from '../src/lib/attainable'
import { betaAt, POSITIONS, positionOf, RATIO } from '../src/lib/beta'
import { Curve } from '../src/lib/curve'
import { news } from '../src/lib/diff'
import { plain, short, signed } from '../src/lib/format'
import { arrange, linear, polyline, ticks } from '../src/lib/geometry'
import { ghost } from '../src/lib/ghost'
import { QUANTITIES } from '../src/lib/quantities'
import { format, parse } from '../src/lib/route.svelte'
import { FileSource, readColumns } from '../src/lib/source'

describe('the ghost', () => {
  const bank = Array.from({ length: 4000 }, (_, i) => {
    const u = (i + 0.5) / 4000
    return Math.sqrt(2) * inverseErf(2 * u - 1)
  })

  it('is the Gaussian law where scores are Gaussian: gain σ²/β, K σ²/2β²', () => {
    for (const beta of [1, 2, 5]) {
      const found = ghost(bank, beta)!
      expect(found.score).toBeCloseTo(1 / beta, 1)
      expect(found.kl).toBeCloseTo(1 / (2 * beta * beta), 1)
    }
  })

  it('reweights two samples as one does by hand', () => {
    const found = ghost([0, 1], 1)!
    const p = Math.E / (1 + Math.E)
    expect(found.score).toBeCloseTo(p, 12)
    expect(found.kl).toBeCloseTo(p * Math.log(2 * p) + (1 - p) * Math.log(2 * (1 - p)), 12)
    expect(found.ess).toBeCloseTo(1 / (p * p + (1 - p) * (1 - p)), 12)
  })

  it('never drifts further than choosing one of N samples', () => {
    for (const beta of [0, 1e-6, 1e-3, 0.1, 10]) expect(ghost(bank, beta)!.kl).toBeLessThanOrEqual(Math.log(4000) + 1e-9)
    expect(ghost([], 1)).toBeNull()
  })

  it('is faded where a handful of samples speaks for all', () => {
    const found = fromScores(bank)
    expect(found[positionOf(1)]!.solid).toBe(true)
    expect(found[positionOf(0.05)]!.solid).toBe(false)
  })

  it('reads the server’s table by interpolation, and never calls a law a measurement', () => {
    const betas = [0.01, 0.1, 1]
    const table = {
      source: 'gaussian', prompts: 0, samples: 0, unit: 'score', betas, score: [3, 2, 1], gain: [3, 2, 1], kl: [30, 20, 10],
      ess: [99, 99, 99], solid: [false, false, false], start: 0, best_of: [], ceiling: { sigma: 1, kl: [], gain: [] }, caption: '',
    }
    const found = fromTable(table)
    expect(found[positionOf(0.1)]!.gain).toBeCloseTo(2, 1)
    expect(found[0]!.gain).toBeCloseTo(3, 12)
    expect(found.some((a) => a.solid)).toBe(false)
  })
})

describe('the slider', () => {
  it('moves by 5 % a step, and its left end is no string', () => {
    expect(betaAt(0)).toBe(0)
    for (let position = 2; position <= POSITIONS; position++) expect(Math.abs(betaAt(position) / betaAt(position - 1) / RATIO - 1)).toBeLessThan(0.01)
    for (let position = 0; position <= POSITIONS; position++) expect(positionOf(betaAt(position))).toBe(position)
    expect(betaAt(POSITIONS)).toBeGreaterThan(2)
  })
})

describe('a curve', () => {
  it('hears once what is told twice, and is cut where a run goes back', () => {
    const curve = Curve.of([0, 1, 2], [1, null, 3])
    curve.push(2, 9)
    curve.push(3, 4)
    expect([...curve.steps]).toEqual([0, 1, 2, 3])
    expect(curve.last).toBe(4)
    expect(curve.at(2.5)).toBe(3)
    expect(curve.recent(3)).toBe(3.5)
    curve.cut(0)
    expect([...curve.values]).toEqual([1])
    curve.push(1, 2)
    expect(curve.lastStep).toBe(1)
  })

  it('grows beyond its first room', () => {
    const curve = new Curve()
    for (let i = 0; i < 5000; i++) curve.push(i, i * i)
    expect(curve.length).toBe(5000)
    expect(curve.at(4999)).toBe(4999 * 4999)
  })
})

describe('the address', () => {
  it('is read as it is written', () => {
    const params = { run: 'runs~a b', compare: 'x,y', step: '40' }
    expect(parse(format('samples', params))).toEqual({ screen: 'samples', params })
    expect(parse('')).toEqual({ screen: null, params: {} })
    expect(format('play', { run: null })).toBe('#/play')
  })
})

describe('the data', () => {
  it('reads binary columns at their places', () => {
    const header = JSON.stringify({ series: [{ name: 'a', points: 2 }, { name: 'b', points: 1 }] }).padEnd(80)
    const buffer = new ArrayBuffer(8 + 80 + 6 * 8)
    new Uint8Array(buffer).set(new TextEncoder().encode('TTH1'))
    new DataView(buffer).setUint32(4, 80, true)
    new Uint8Array(buffer).set(new TextEncoder().encode(header), 8)
    new Float64Array(buffer, 88).set([0, 1, 10, 11, 5, 50])
    const found = readColumns(buffer)
    expect([...(found['a']!.values as Float64Array)]).toEqual([10, 11])
    expect([...(found['b']!.steps as Float64Array)]).toEqual([5])
  })

  it('answers from the file what the server would answer, and refuses to steer', async () => {
    const sample = { step: 5, row: 1 }
    const all = { probe: { '0': [{ step: 0, row: 1 }], '5': [sample] }, train: {} }
    const source = new FileSource({ responses: { 'api/runs/a~b/samples': { steps: { probe: [0, 5], train: [] }, all } } })
    expect((await source.samples('a~b', { split: 'probe' })).samples).toEqual([sample])
    expect((await source.samples('a~b', { split: 'probe', row: 1 })).samples).toHaveLength(2)
    expect((await source.samples('a~b', { split: 'probe', step: 0 })).step).toBe(0)
    await expect(source.post()).rejects.toThrow('read-only')
    await expect(source.get('api/none')).rejects.toThrow('not in the report')
  })
})

describe('names beside points', () => {
  const page = [0, 0, 300, 200] as const
  it('lie beside their point, on the other side at the edge', () => {
    expect(arrange([{ x: 50, y: 50, text: 'now' }], [], page)[0]!.x).toBeGreaterThan(50)
    expect(arrange([{ x: 295, y: 50, text: 'now' }], [], page)[0]!.x).toBeLessThan(295 - 15)
  })
  it('never lie on each other or on a mark', () => {
    const near = [0, 6, 11].map((d) => ({ x: 150 + d, y: 100 - d / 2, text: `best of ${d}` }))
    const found = arrange(near, near, page)
    expect(found.length).toBeGreaterThan(1)
    for (const [i, a] of found.entries()) {
      for (const b of found.slice(i + 1)) {
        const apart = Math.abs(a.y - b.y) >= 13 || Math.abs(a.x - b.x) >= 6.3 * Math.min(a.text.length, b.text.length)
        expect(apart).toBe(true)
      }
    }
  })
  it('are left out where there is no room', () => {
    const crowd = Array.from({ length: 40 }, () => ({ x: 30, y: 30, text: 'the same place' }))
    expect(arrange(crowd, [], [0, 0, 140, 60]).length).toBeLessThan(6)
  })
})

describe('what is drawn', () => {
  it('has round ticks within its bounds', () => {
    expect(ticks(0, 10, 5)).toEqual([0, 2, 4, 6, 8, 10])
    expect(ticks(-0.3, 1.1, 4).every((tick) => tick >= -0.3 && tick <= 1.1)).toBe(true)
    expect(ticks(1, 1, 4)).toEqual([])
    expect(linear([0, 2], [100, 0])(1)).toBe(50)
    expect(linear([0, 1], [0, 10], true)(7)).toBe(10)
  })

  it('lifts the pen where a number is missing', () => {
    expect(polyline([[0, 0], [1, 1], [2, NaN], [3, 3]])).toBe('M0.0,0.0L1.0,1.0M3.0,3.0')
  })

  it('tells quantities apart without colour too', () => {
    const { other: _, ...named } = QUANTITIES
    const dashes = Object.values(named).map((q) => q.dash.join())
    expect(new Set(dashes).size).toBe(dashes.length)
  })

  it('marks what is new', () => {
    expect(news(['a', 'x', 'c'], ['a', 'b', 'c'])).toEqual([false, true, false])
  })

  it('writes numbers as people read them', () => {
    expect([short(0.12345), short(12345), short(null), short(-2)]).toEqual(['0.123', '12,345', '–', '−2.00'])
    expect([signed(1.5), signed(-0.0001), plain(0.2), plain(0.0999)]).toEqual(['+1.50', '0.00', '0.2', '0.0999'])
  })
})

function inverseErf(x: number): number {
  const a = 0.147, log = Math.log(1 - x * x), b = 2 / (Math.PI * a) + log / 2
  return Math.sign(x) * Math.sqrt(Math.sqrt(b * b - log / a) - b)
}
