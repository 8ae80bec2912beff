/// What one reply says that another does not: the longest common subsequence of tokens.

/** For each token of `mine` whether it is new beside `other`. Above 400 tokens nothing is marked. */
export function news(mine: readonly string[], other: readonly string[]): boolean[] {
  const n = mine.length, m = other.length
  if (n > 400 || m > 400) return mine.map(() => false)
  const table = Array.from({ length: n + 1 }, () => new Uint16Array(m + 1))
  for (let i = n - 1; i >= 0; i--) {
    for (let j = m - 1; j >= 0; j--) {
      table[i]![j] = mine[i] === other[j] ? table[i + 1]![j + 1]! + 1 : Math.max(table[i + 1]![j]!, table[i]![j + 1]!)
    }
  }
  const found = mine.map(() => true)
  for (let i = 0, j = 0; i < n && j < m; ) {
    if (mine[i] === other[j]) {
      found[i] = false
      i++
      j++
    } else if (table[i + 1]![j]! >= table[i]![j + 1]!) i++
    else j++
  }
  return found
}

/** Words, where the tokens of a reply are not known. */
export function words(text: string): string[] {
  return text.match(/\s*[^\s]+/g) ?? []
}
