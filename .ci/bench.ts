// What ftw-monitor costs: `npm run bench`, or `node .ci/bench.ts` on Node.js 22.18 and later.
// Every ratio is the median of paired, interleaved runs (A B C C B A), with its quartiles. The
// load and each server have a process of their own, and all are started anew for each generation:
// two processes of the same code differ by several per cent for as long as they live.

import { fork } from 'node:child_process'
import { once } from 'node:events'
import * as http from 'node:http'
import * as net from 'node:net'
import { availableParallelism } from 'node:os'
import { fileURLToPath } from 'node:url'

const GENERATIONS = 5
const ROUNDS = 5 // in each generation
const RUN_MS = 110
const WARM_MS = 550 // of each load: V8 goes on optimizing for some ten thousand checks
const CROWD = 32 // at a time
const PIPELINED = 1_000 // commands on their way at a time
const KEPT_ALIVE = 8 // connections of the host's own clients
const STARTS = 9 // processes with and without the module, for its time and memory
const SETTLED_MS = 200 // until a process that has just started takes no more memory

type ServerKind = 'bare lines' | 'bare http' | 'hand-over' | 'monitor'
type Kind = 'lines' | 'http' | 'pipelined' | 'own'
interface Load { kind: Kind, port: number, atATime: number, ms: number }
interface Started { port: number, monitorPort: number, importMs: number, startMs: number }
interface Usage { cpuMicroseconds: number, rss: number }
interface Run { perSecond: number, cpu: number, busy: number } // cpu in µs for each answer
interface Process { ask(question: unknown): Promise<unknown>, end(): void }

const OK = 'OK\n'
const QUESTIONS: Record<Kind, string> = {
  lines: 'health_check\n',
  http: 'GET /health_check HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n',
  pipelined: 'health_check\n'.repeat(PIPELINED),
  own: 'GET / HTTP/1.1\r\nHost: localhost\r\n\r\n'
}

// --- The servers ---------------------------------------------------------------------------------

function bareLines(): net.Server {
  return net.createServer((socket) => {
    socket.on('error', quiet).on('data', () => socket.end(OK))
  })
}

function bareHttp(): http.Server {
  return http.createServer((_, response) => { response.end(OK) })
}

/** As little as it takes to see the first bytes and leave the rest to Node.js. */
function handOver(): net.Server {
  const taker = bareHttp()
  return net.createServer((socket) => {
    socket.on('error', quiet).once('data', (chunk) => {
      socket.unshift(chunk)
      taker.emit('connection', socket)
    })
  })
}

function quiet(): void {}

async function serve(kind: ServerKind): Promise<void> {
  const make = kind === 'bare lines' ? bareLines : kind === 'hand-over' ? handOver : bareHttp
  const server = make()
  await once(server.listen(0, '127.0.0.1'), 'listening')
  const { port } = server.address() as net.AddressInfo
  const started: Started = { port, monitorPort: port, importMs: 0, startMs: 0 }
  if (kind === 'monitor') {
    const startedAt = performance.now()
    const { start } = await import('../monitor.ts')
    const importedAt = performance.now()
    const logger = { ...console, info: quiet }
    const address = await start({ server, listen: { host: '127.0.0.1', port: 0 }, logger })
    started.startMs = performance.now() - importedAt
    started.importMs = importedAt - startedAt
    started.monitorPort = (address as net.AddressInfo).port
  }
  answer((question): Started | Usage => {
    if (question === 'started') return started
    const { user, system } = process.cpuUsage()
    return { cpuMicroseconds: user + system, rss: process.memoryUsage.rss() }
  })
}

// --- The load ------------------------------------------------------------------------------------

/** Asks for a while, and tells what was answered in which time. */
async function load({ kind, port, atATime, ms }: Load): Promise<{ answers: number, ms: number }> {
  const startedAt = performance.now()
  const isOver = () => performance.now() - startedAt >= ms
  const asks = kind === 'lines' || kind === 'http' ? connectAnew : stayConnected
  const answers = await Promise.all(
    Array.from({ length: atATime }, () => asks(kind, port, isOver)))
  return { answers: answers.reduce((sum, one) => sum + one), ms: performance.now() - startedAt }
}

/** A new connection for each question, with as few listeners as will do; any error is fatal. */
function connectAnew(kind: Kind, port: number, isOver: () => boolean): Promise<number> {
  return new Promise((resolve) => {
    let closed = 0
    let answered = 0
    const take = (chunk: Buffer) => { if (chunk.includes(OK)) answered++ }
    const next = () => {
      const socket = net.connect(port, '127.0.0.1')
      socket.on('data', take).on('close', () => {
        if (++closed !== answered) throw new Error('a check got no OK')
        if (isOver()) resolve(answered)
        else next()
      })
      socket.write(QUESTIONS[kind], 'latin1')
    }
    next()
  })
}

/** Many questions on one connection, whose first reply opens it and does not count. */
function stayConnected(kind: Kind, port: number, isOver: () => boolean): Promise<number> {
  const answersEach = kind === 'pipelined' ? PIPELINED : 1
  const length = kind === 'pipelined' ? OK.length * PIPELINED : 1 // of what is waited for
  return new Promise((resolve) => {
    let answers = 0
    let received = 0
    const socket = net.connect(port, '127.0.0.1')
    const next = () => socket.write(QUESTIONS[kind], 'latin1')
    const take = (chunk: Buffer) => {
      received += chunk.length
      if (received < length) return
      received = 0
      answers += answersEach
      if (isOver()) {
        socket.destroy()
        resolve(answers)
      } else next()
    }
    socket.write(kind === 'pipelined' ? 'interactive\n' : QUESTIONS[kind])
    socket.once('data', () => {
      socket.on('data', take)
      next()
    })
  })
}

// --- The processes -------------------------------------------------------------------------------

/** In a process that was started here: answers whatever is asked, and ends with its parent. */
function answer(give: (question: unknown) => unknown): void {
  process.on('message', async (question) => process.send?.(await give(question)))
  process.on('disconnect', () => process.exit())
}

function start(role: string): Process {
  const env = { FTW_MONITOR_AUTOWARMUP: 'off' } // and nothing else, as PORT or NODE_OPTIONS
  const child = fork(fileURLToPath(import.meta.url), [role], { env })
  child.on('exit', (code) => { if (code) process.exit(code) }) // it has said why
  return {
    async ask(question) {
      child.send(question as object)
      const [reply] = await once(child, 'message')
      return reply
    },
    end: () => child.disconnect()
  }
}

async function usage(server: Process): Promise<Usage> {
  return await server.ask('usage') as Usage
}

async function measure(server: Process, loader: Process, what: Load): Promise<Run> {
  const before = await usage(server)
  const { answers, ms } = await loader.ask(what) as Awaited<ReturnType<typeof load>>
  const cpuMicroseconds = (await usage(server)).cpuMicroseconds - before.cpuMicroseconds
  return {
    perSecond: answers / ms * 1e3, cpu: cpuMicroseconds / answers, busy: cpuMicroseconds / ms / 1e3
  }
}

// --- The table -----------------------------------------------------------------------------------

/** The first kind is the bare one; each of the rounds has a run of every kind. */
interface Comparison {
  name: string, kind: Kind, atATime: number, servers: ServerKind[], target: number
}

const LINES: ServerKind[] = ['bare lines', 'monitor']
const HTTP: ServerKind[] = ['bare http', 'hand-over', 'monitor']
const COMPARISONS: Comparison[] = [
  { name: 'health_check', kind: 'lines', atATime: 1, servers: LINES, target: 0.95 },
  { name: 'health_check', kind: 'lines', atATime: CROWD, servers: LINES, target: 0.9 },
  { name: 'GET /health_check', kind: 'http', atATime: 1, servers: HTTP, target: 0.7 },
  { name: 'GET /health_check', kind: 'http', atATime: CROWD, servers: HTTP, target: 0.7 }
]
const OWN: Comparison = {
  name: 'own', kind: 'own', atATime: KEPT_ALIVE, servers: ['bare http', 'monitor'], target: 3
}
const INTERACTIVE: Comparison = {
  name: 'interactive', kind: 'pipelined', atATime: 1, servers: ['monitor'], target: 0
}

type Rounds = Map<Comparison, Run[][]>

async function runGeneration(rounds: Rounds): Promise<void> {
  const loader = start('load')
  const servers = new Map<string, Process>()
  const run = async ({ kind, atATime }: Comparison, wanted: ServerKind, ms: number) => {
    const name = `${wanted} for ${kind}` // a server that knew other loads would be the slower one
    const server = servers.get(name) ?? start(wanted)
    servers.set(name, server)
    const { port, monitorPort } = await server.ask('started') as Started
    return measure(server, loader, { kind, port: kind === 'own' ? port : monitorPort, atATime, ms })
  }
  for (const comparison of [...rounds.keys()].reverse()) { // the crowds warm faster than the ones
    for (const server of comparison.servers) await run(comparison, server, WARM_MS)
  }
  for (let round = 0; round < ROUNDS; round++) {
    for (const [comparison, done] of rounds) {
      const there: Run[] = []
      const back: Run[] = []
      for (const kind of comparison.servers) there.push(await run(comparison, kind, RUN_MS))
      for (const kind of comparison.servers.toReversed()) {
        back.unshift(await run(comparison, kind, RUN_MS))
      }
      done.push(there.map((one, index) => mean(one, back[index]!)))
    }
  }
  for (const { end } of [loader, ...servers.values()]) end()
}

function mean(one: Run, other: Run): Run {
  const of = (name: keyof Run) => (one[name] + other[name]) / 2
  return { perSecond: of('perSecond'), cpu: of('cpu'), busy: of('busy') }
}

/** Processes with and without the module, side by side. */
async function measureStarts(): Promise<(Started & { megabytes: number })[]> {
  const starts = []
  for (let count = 0; count < STARTS; count++) {
    const bare = start('bare http')
    const monitor = start('monitor')
    await bare.ask('started')
    const started = await monitor.ask('started') as Started
    await new Promise((resolve) => setTimeout(resolve, SETTLED_MS))
    const bytes = (await usage(monitor)).rss - (await usage(bare)).rss
    starts.push({ ...started, megabytes: bytes / 2 ** 20 })
    for (const { end } of [bare, monitor]) end()
  }
  return starts
}

/** The median, and as text with the quartiles. */
function spread(values: number[], digits: number): { median: number, text: string } {
  const sorted = values.toSorted((one, other) => one - other)
  const [low, median, high] = [0.25, 0.5, 0.75].map(
    (share) => sorted[Math.round(share * (sorted.length - 1))] ?? NaN) as [number, number, number]
  const text = `${median.toFixed(digits)} (${low.toFixed(digits)}-${high.toFixed(digits)})`
  return { median, text }
}

function row(...cells: string[]): void {
  const widths = [46, 11, 22, 22, 6]
  console.log(cells.map((cell, index) => cell.padEnd(widths[index] ?? 0)).join('').trimEnd())
}

function printComparison({ name, atATime, servers, target }: Comparison, runs: Run[][]): void {
  for (const [index, kind] of servers.entries()) {
    const of = (value: (run: Run, bare: Run) => number, digits: number) =>
      spread(runs.map((round) => value(round[index]!, round[0]!)), digits)
    const rate = of(({ perSecond }) => perSecond, 0).median.toFixed(0)
    const busy = of((one) => one.busy, 2).median.toFixed(2)
    const title = `${name}, ${atATime} at a time: ${kind}`
    const speed = of((one, bare) => one.perSecond / bare.perSecond, 2)
    const cpu = of((one, bare) => bare.cpu / one.cpu, 2)
    const judged = (atATime === 1 ? speed : cpu).median
    if (index === 0) row(title, rate, '', '', busy)
    else if (kind === 'hand-over') row(title, rate, speed.text, cpu.text, busy)
    else {
      const verdict = judged >= target ? 'ok' : 'short'
      row(title, rate, speed.text, cpu.text, busy, `${target.toFixed(2)} ${verdict}`)
    }
  }
}

async function main(): Promise<void> {
  const rounds: Rounds = new Map([...COMPARISONS, OWN, INTERACTIVE].map((each) => [each, []]))
  for (let count = 0; count < GENERATIONS; count++) await runGeneration(rounds)
  const starts = await measureStarts()

  console.log(`Node.js ${process.version}, ${availableParallelism()} cores; medians of ` +
    `${GENERATIONS * ROUNDS} rounds (and quartiles)\n`)
  row('', 'answers/s', 'ratio', 'CPU ratio', 'busy', 'target')
  for (const comparison of COMPARISONS) printComparison(comparison, rounds.get(comparison)!)
  console.log(`
Ratios are to the bare server: of answers a second, and of the CPU time that the server's process
takes for one. "busy" is that process's share of a core. One at a time is judged by the first ratio;
${CROWD} at a time by the second, as the load is the slower side before the server is saturated.
`)
  const own = rounds.get(OWN)!
  const of = (index: number) => spread(own.map((round) => round[index]!.cpu), 1).text
  const more = spread(own.map(([bare, monitor]) => monitor!.cpu - bare!.cpu), 2)
  const interactive = rounds.get(INTERACTIVE)!.map(([run]) => run!)
  const verdict = more.median <= OWN.target ? 'ok' : 'short'
  const list: [string, string][] = [
    ['CPU of an own request, without, µs', of(0)],
    ['CPU of an own request, with, µs', of(1)],
    ['  more, µs', `${more.text}   target ${OWN.target} ${verdict}`],
    ['commands pipelined on one connection, /s',
      spread(interactive.map((run) => run.perSecond), 0).text +
      `   busy ${spread(interactive.map((run) => run.busy), 2).median.toFixed(2)}`],
    ['import (node:http being there), ms', spread(starts.map((one) => one.importMs), 1).text],
    ['start, ms', spread(starts.map((one) => one.startMs), 1).text],
    ['resident memory, more, MiB', spread(starts.map((one) => one.megabytes), 1).text]
  ]
  for (const [name, value] of list) row(name, value)
}

const [, , role] = process.argv
if (role === undefined) await main()
else if (role === 'load') answer((what) => load(what as Load))
else await serve(role as ServerKind)
