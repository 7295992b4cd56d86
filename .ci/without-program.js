// Prints monitor.ts without its program, as a CommonJS project would copy it: there, import.meta,
// by which the program tells whether it is run, does not compile.

import * as fs from 'node:fs'

const PROGRAM = /^\/\/ --- The program[^]*/m // from this line on, monitor.ts may be deleted

const source = fs.readFileSync(new URL('../monitor.ts', import.meta.url), 'utf8')
if (!PROGRAM.test(source)) throw new Error('monitor.ts has no line that begins the program')
process.stdout.write(source.replace(PROGRAM, ''))
