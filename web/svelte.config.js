import { vitePreprocess } from '@sveltejs/vite-plugin-svelte'

/** A short name for a component's styles: it stands at each of its elements, and the script has a budget. */
const cssHash = ({ hash, css }) => `s${hash(css)}`

export default { preprocess: vitePreprocess(), compilerOptions: { runes: true, cssHash } }
