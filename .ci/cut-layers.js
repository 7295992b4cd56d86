// Prints monitor.ts up to a layer, without that layer and what follows it:
//
//   node .ci/cut-layers.js 'the program'
//
// So a CommonJS project copies it: there import.meta, by which the program tells whether it is run,
// does not compile.

import * as fs from 'node:fs'

const [, , layer] = process.argv
const source = fs.readFileSync(new URL('../monitor.ts', import.meta.url), 'utf8')
const beginsAt = source.indexOf(`// --- Layer: ${layer};`)
if (beginsAt < 0) throw new Error(`monitor.ts has no layer "${layer}"`)
process.stdout.write(source.slice(0, beginsAt))
