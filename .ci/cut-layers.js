// Prints monitor.ts up to a layer, without that layer and what follows it:
//
//   node .ci/cut-layers.js 'the program'
//
// So a CommonJS project copies it: there import.meta, by which the program tells whether it is run,
// does not compile. The package's own CommonJS build keeps the program, and tells by CommonJS:
//
//   node .ci/cut-layers.js --commonjs

import * as fs from 'node:fs'

const TELL_BY_COMMONJS = 'if (require.main === module) void runProgram()\n'

const [, , layer] = process.argv
const isCommonJs = layer === '--commonjs'
const banner = isCommonJs ? '// --- Called or imported -' : `// --- Layer: ${layer};`
const source = fs.readFileSync(new URL('../monitor.ts', import.meta.url), 'utf8')
const beginsAt = source.indexOf(banner)
if (beginsAt < 0) throw new Error(`monitor.ts has no line ${banner}`)
process.stdout.write(source.slice(0, beginsAt))
if (isCommonJs) process.stdout.write(TELL_BY_COMMONJS)
