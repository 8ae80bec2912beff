/// One bundle, one style sheet, fixed names: the server serves them, and `tether report` puts them into one file.
import { svelte } from '@sveltejs/vite-plugin-svelte'
import { defineConfig } from 'vitest/config'

export default defineConfig({
  plugins: [svelte()],
  base: './',
  build: {
    outDir: '../src/tether/page/static',
    emptyOutDir: true,
    target: 'es2022',
    modulePreload: false,
    cssCodeSplit: false,
    chunkSizeWarningLimit: 400,
    rolldownOptions: {
      output: {
        codeSplitting: false,
        entryFileNames: 'page.js',
        assetFileNames: 'page[extname]',
      },
    },
  },
  server: { proxy: { '/api': 'http://127.0.0.1:8765' } },
  resolve: process.env['VITEST'] ? { conditions: ['browser'] } : {},
  // A busy machine makes nothing wrong: what is tested is seeded and of a length of its own.
  test: { include: ['tests/**/*.test.ts'], environment: 'node', testTimeout: 120_000 },
})
