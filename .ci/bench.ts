// What ftw-monitor costs: `npm run bench`. To compare versions with one another, name the compiled
// modules: `npm run bench -- old/monitor.js new/monitor.js`, or `BENCH_MODULE=old/monitor.js`.
//
// A check over HTTP is compared with those of two packages of npm as well. They are installed into
// a temporary folder, or taken from the one that `BENCH_PEERS` names, in whose `node_modules` they
// are; `BENCH_PEERS=off` does without them.
//
// Every ratio is the median of paired, interleaved runs (A B C C B A), with its quartiles. Each
// server is a process alone on one core, and bench-client.c saturates it from another core. All
// servers are started anew for each generation, since two processes of the same code differ by
// several per cent for as long as they live.

import {
  execFile,
  execFileSync,
  fork,
  type ChildProcess,
  type ForkOptions
} from 'node:child_process'
import { once } from 'node:events'
import { existsSync, mkdtempSync, rmSync } from 'node:fs'
import * as http from 'node:http'
import * as net from 'node:net'
import { tmpdir } from 'node:os'
import { extname, join, relative, resolve } from 'node:path'
import { setTimeout as pause } from 'node:timers/promises'
import { fileURLToPath, pathToFileURL } from 'node:url'
import { promisify } from 'node:util'

const GENERATIONS_MAX = 8
const GENERATIONS_MIN = 3
const BUDGET_MS = 120_000 // a machine that does other things as well gets fewer generations
const ROUNDS = 3 // in each generation
const CROWD = 32 // connections at a time
const KEPT_ALIVE = 8 // connections of the host's own clients
const STARTS = 9 // processes with and without the module, for its time and memory
const INSTALL_MS = 60_000 // for npm to install the peers
const SETTLED_MS = 200 // until a process that has just started takes no more memory

const OK = 'OK\n'
const OWN_TARGET_MICROSECONDS = 3
const SERVE = 'serve' // the first argument of a server's process
const BARE_LINES = 'bare lines'
const BARE_HTTP = 'bare http'
const HAND_OVER = 'hand-over'

/** A package of npm that answers checks over HTTP, too. */
interface Peer {
  name: string
  version: string
  /** What it is asked, and what it answers. */
  path: string
  body: string
  /** Starts it, from the folder that holds its package. */
  start(folder: string): Promise<net.Server>
}

const PEERS: Peer[] = [
  {
    name: 'lightship',
    version: '9.0.4',
    path: '/ready',
    body: 'SERVER_IS_READY',
    start: startLightship
  },
  {
    name: '@godaddy/terminus',
    version: '4.12.1',
    path: '/health_check',
    body: '{"status":"ok"}',
    start: startTerminus
  }
]

/** One measure, taken of the modules and of servers to compare them with. */
interface Comparison {
  title: string
  /** What bench-client is to ask. */
  question: 'lines' | 'http' | 'own' | 'pipelined'
  atATime: number
  /** In one run, long enough for a garbage collection or two. */
  checks: number
  /** Before the first run: V8 goes on optimizing for some ten thousand checks. */
  warmChecks: number
  /** The bare server, and what else stands beside the modules. */
  others: string[]
  /** Whether peers stand there, too. */
  hasPeers?: boolean
  /** The ratio to the bare server that a module is to reach. */
  target?: number
}

const COMPARISONS: Comparison[] = [
  {
    title: 'health_check, 32 at a time',
    question: 'lines',
    atATime: CROWD,
    checks: 4_000,
    warmChecks: 15_000,
    others: [BARE_LINES],
    target: 0.93
  },
  {
    title: 'health_check, 1 at a time',
    question: 'lines',
    atATime: 1,
    checks: 1_000,
    warmChecks: 500,
    others: [BARE_LINES],
    target: 0.95
  },
  {
    title: 'GET /health_check, 32 at a time',
    question: 'http',
    atATime: CROWD,
    checks: 2_000,
    warmChecks: 6_000,
    others: [BARE_HTTP, HAND_OVER],
    hasPeers: true,
    target: 0.925 // so at most 1.08 of the bare server's CPU time
  },
  {
    title: 'GET /health_check, 1 at a time',
    question: 'http',
    atATime: 1,
    checks: 1_000,
    warmChecks: 500,
    others: [BARE_HTTP, HAND_OVER],
    target: 0.7
  },
  {
    title: "the host's own requests, 8 at a time",
    question: 'own',
    atATime: KEPT_ALIVE,
    checks: 5_000,
    warmChecks: 15_000,
    others: [BARE_HTTP]
  },
  {
    title: 'commands pipelined on one connection',
    question: 'pipelined',
    atATime: 1,
    checks: 10_000,
    warmChecks: 30_000,
    others: []
  }
]

/** What a server's process says of itself when it listens. */
interface Started {
  /** Of the host's own HTTP server. */
  port: number
  monitorPort: number
  importMs: number
  startMs: number
}

interface Usage {
  cpuMicroseconds: number
  rssBytes: number
}

interface Run {
  perSecond: number
  /** CPU time of the server's process for one answer. */
  cpuMicroseconds: number
  /** The process's share of a core: near 1 it is saturated. */
  busy: number
}

/** The runs of one round, in the order of the comparison's servers. */
type Round = Run[]

/** Which core is whose, as `taskset` counts them. */
interface Cores {
  server: string
  client: string
}

// --- The servers ---------------------------------------------------------------------------------

function quiet(): void {}

/** The barest server that answers a line and survives a reset. */
function bareLines(): net.Server {
  return net.createServer((socket) => {
    socket.on('error', quiet)
    socket.once('data', () => socket.end(OK))
  })
}

function bareHttp(): http.Server {
  return http.createServer((_, response) => {
    response.end(OK)
  })
}

/** As little as it takes to see the first bytes and leave the rest to Node.js. */
function handOver(): net.Server {
  const httpServer = bareHttp()
  return net.createServer((socket) => {
    socket.on('error', quiet)
    socket.once('data', (chunk) => {
      socket.unshift(chunk)
      httpServer.emit('connection', socket)
    })
  })
}

interface Lightship {
  server: http.Server
  signalReady(): void
}

/** Lightship listens by itself, at any free port where it finds no Kubernetes. */
async function startLightship(folder: string): Promise<net.Server> {
  const { createLightship } = await importFrom<{ createLightship: () => Promise<Lightship> }>(
    folder,
    'lightship/dist/esm/index.js'
  )
  const lightship = await createLightship()
  lightship.signalReady()
  return lightship.server
}

/** Terminus answers on the host's own server. */
async function startTerminus(folder: string): Promise<net.Server> {
  const { createTerminus } = await importFrom<{ createTerminus: Terminus }>(
    folder,
    '@godaddy/terminus/index.js'
  )
  const healthChecks = { '/health_check': async () => {} }
  return createTerminus(bareHttp(), { healthChecks })
}

type Terminus = (server: http.Server, options: object) => http.Server

async function importFrom<Module>(folder: string, path: string): Promise<Module> {
  return (await import(pathToFileURL(join(folder, 'node_modules', path)).href)) as Module
}

async function createServer(kind: string): Promise<net.Server> {
  if (kind === BARE_LINES) return bareLines()
  if (kind === HAND_OVER) return handOver()
  const peer = peerNamed(kind)
  return peer ? peer.start(process.env['BENCH_PEERS'] ?? '') : bareHttp()
}

function peerNamed(server: string): Peer | undefined {
  return PEERS.find(({ name }) => name === server)
}

function isModule(server: string): boolean {
  return ![BARE_LINES, BARE_HTTP, HAND_OVER].includes(server) && !peerNamed(server)
}

/** Starts the monitor of a module beside the host's server. */
async function startMonitor(module: string, server: http.Server, port: number): Promise<Started> {
  const startedAt = performance.now()
  const { start } = (await import(pathToFileURL(module).href)) as typeof import('../monitor.ts')
  const importedAt = performance.now()

  const logger = { ...console, info: quiet }
  const address = await start({ server, listen: { host: '127.0.0.1', port: 0 }, logger })
  return {
    port,
    monitorPort: (address as net.AddressInfo).port,
    importMs: importedAt - startedAt,
    startMs: performance.now() - importedAt
  }
}

/** What a server's process does: it listens, and tells its parent what it has used. */
async function serve(kind: string): Promise<void> {
  const server = await createServer(kind)
  if (!server.listening) {
    server.listen(0, '127.0.0.1')
    await once(server, 'listening')
  }
  const { port } = server.address() as net.AddressInfo

  let started: Started = { port, monitorPort: port, importMs: 0, startMs: 0 }
  if (isModule(kind)) started = await startMonitor(kind, server as http.Server, port)

  process.on('disconnect', () => process.exit())
  process.on('message', () => {
    const { user, system } = process.cpuUsage()
    const usage: Usage = { cpuMicroseconds: user + system, rssBytes: process.memoryUsage.rss() }
    process.send?.(usage)
  })
  process.send?.(started)
}

// --- Processes and cores -------------------------------------------------------------------------

/** Undefined where there is but one core, or no `taskset`. */
function findCores(): Cores | undefined {
  const cores = listCores()
  const first = cores[0]
  const last = cores.at(-1)
  if (first === undefined || last === undefined || first === last) return undefined
  return { server: last, client: first }
}

function listCores(): string[] {
  try {
    // pid 4711's current affinity list: 0-3,6
    const text = execFileSync('taskset', ['-cp', `${process.pid}`], { encoding: 'utf8' })
    return text.split(':')[1]?.match(/\d+/g) ?? []
  } catch {
    return []
  }
}

function hasCompiler(): boolean {
  try {
    execFileSync('gcc', ['--version'], { stdio: 'ignore' })
    return true
  } catch {
    return false
  }
}

/** Makes a folder that ends with this process. */
function makeFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), 'ftw-monitor-bench-'))
  process.on('exit', () => rmSync(folder, { recursive: true }))
  return folder
}

/** Compiles the client, and gives its path. */
function compileClient(): string {
  // This file runs from `.ci` as it stands, and from `dist/.ci` when it is compiled.
  const places = ['bench-client.c', '../../.ci/bench-client.c']
  const paths = places.map((place) => fileURLToPath(new URL(place, import.meta.url)))
  const source = paths.find((path) => existsSync(path))
  if (source === undefined) throw new Error(`nothing is at ${paths.join(' nor at ')}`)

  const client = join(makeFolder(), 'bench-client')
  execFileSync('gcc', ['-O2', '-Wall', '-o', client, source], { stdio: 'inherit' })
  return client
}

/** Gives the folder of the peers, in which npm installs them; undefined where it cannot. */
function installPeers(): string | undefined {
  const folder = makeFolder()
  const packages = PEERS.map(({ name, version }) => `${name}@${version}`)
  const words = ['install', '--prefix', folder, '--ignore-scripts', '--no-audit', '--no-fund']
  try {
    execFileSync('npm', [...words, ...packages], { stdio: 'ignore', timeout: INSTALL_MS })
    return folder
  } catch {
    console.error(`npm could not install ${packages.join(' and ')}, so they are not measured.`)
    return undefined
  }
}

/** Gives the peers that start here. The servers' processes find them by the environment. */
async function findPeers(): Promise<string[]> {
  const named = process.env['BENCH_PEERS']
  if (named === 'off') return []
  const folder = named ?? installPeers()
  if (folder === undefined) return []

  process.env['BENCH_PEERS'] = resolve(folder)
  const startable: string[] = []
  for (const { name } of PEERS) {
    try {
      const server = await ServerProcess.start(name)
      server.end()
      startable.push(name)
    } catch {
      console.error(`${name} does not start from ${folder}, so it is not measured.`)
    }
  }
  return startable
}

/** A server in a process of its own. */
class ServerProcess {
  readonly #child: ChildProcess
  readonly started: Started

  private constructor(child: ChildProcess, started: Started) {
    this.#child = child
    this.started = started
  }

  static async start(kind: string, core?: string): Promise<ServerProcess> {
    // No PORT and no NODE_OPTIONS of ours, but taskset must be found.
    const { PATH, BENCH_PEERS } = process.env
    const env = { PATH, BENCH_PEERS, FTW_MONITOR_AUTOWARMUP: 'off' }
    const options: ForkOptions = { env }
    if (core !== undefined) {
      options.execPath = 'taskset'
      options.execArgv = ['-c', core, process.execPath]
    }
    const child = fork(fileURLToPath(import.meta.url), [SERVE, kind], options)
    const started = await Promise.race([once(child, 'message'), once(child, 'exit')])
    if (child.exitCode !== null) throw new Error(`${kind} does not start`) // it has said why

    child.on('exit', (code) => {
      if (code) process.exit(code)
    })
    return new ServerProcess(child, started[0] as Started)
  }

  async usage(): Promise<Usage> {
    this.#child.send('usage')
    const [usage] = (await once(this.#child, 'message')) as [Usage]
    return usage
  }

  end(): void {
    this.#child.disconnect()
  }
}

// --- The runs ------------------------------------------------------------------------------------

const execute = promisify(execFile)

class Bench {
  readonly rounds = new Map<Comparison, Round[]>()
  readonly #client: string
  readonly #modules: string[]
  readonly #peers: string[]
  readonly #cores = findCores()
  #servers = new Map<string, ServerProcess>()

  constructor(client: string, comparisons: Comparison[], modules: string[], peers: string[]) {
    this.#client = client
    this.#modules = modules
    this.#peers = peers
    for (const comparison of comparisons) this.rounds.set(comparison, [])
  }

  get isPinned(): boolean {
    return this.#cores !== undefined
  }

  /** The bare server is the first one. */
  serversOf({ others, hasPeers = false }: Comparison): string[] {
    const peers = hasPeers ? this.#peers : []
    return [...others, ...peers, ...this.#modules]
  }

  /** Starts all servers anew, warms them, and takes some rounds. */
  async runGeneration(): Promise<void> {
    for (const comparison of this.rounds.keys()) {
      for (const server of this.serversOf(comparison)) {
        await this.#run(comparison, server, comparison.warmChecks)
      }
    }
    for (let count = 0; count < ROUNDS; count++) {
      for (const [comparison, rounds] of this.rounds) rounds.push(await this.#runRound(comparison))
    }

    for (const server of this.#servers.values()) server.end()
    this.#servers = new Map()
  }

  /** Runs there and back, so that what changes steadily in between is the same for all. */
  async #runRound(comparison: Comparison): Promise<Round> {
    const servers = this.serversOf(comparison)
    const there: Run[] = []
    for (const server of servers) {
      there.push(await this.#run(comparison, server, comparison.checks))
    }

    const back: Run[] = []
    for (const server of servers.toReversed()) {
      back.unshift(await this.#run(comparison, server, comparison.checks))
    }
    return there.map((run, index) => mean(run, back[index]!))
  }

  async #run({ question, atATime }: Comparison, kind: string, checks: number): Promise<Run> {
    const server = await this.#serverFor(kind, question)
    const { port, monitorPort } = server.started
    const asked = question === 'own' ? port : monitorPort
    const peer = peerNamed(kind)
    const pathAndBody = peer ? [peer.path, peer.body] : []

    const before = await server.usage()
    const numbers = [asked, atATime, checks].map(String)
    const output = await this.#load(question, ...numbers, ...pathAndBody)
    const after = await server.usage()

    const [answers = NaN, nanoseconds = NaN] = output.split(' ').map(Number)
    const cpuMicroseconds = after.cpuMicroseconds - before.cpuMicroseconds
    return {
      perSecond: (answers / nanoseconds) * 1e9,
      cpuMicroseconds: cpuMicroseconds / answers,
      busy: (cpuMicroseconds / nanoseconds) * 1e3
    }
  }

  /** Runs the client, and gives what it prints. */
  async #load(...words: string[]): Promise<string> {
    const core = this.#cores?.client
    if (core === undefined) return (await execute(this.#client, words)).stdout
    return (await execute('taskset', ['-c', core, this.#client, ...words])).stdout
  }

  /** A server that also knew other questions would be the slower one. */
  async #serverFor(kind: string, question: string): Promise<ServerProcess> {
    const name = `${kind} for ${question}`
    const running = this.#servers.get(name)
    if (running) return running

    const server = await ServerProcess.start(kind, this.#cores?.server)
    this.#servers.set(name, server)
    return server
  }
}

function mean(one: Run, other: Run): Run {
  return {
    perSecond: (one.perSecond + other.perSecond) / 2,
    cpuMicroseconds: (one.cpuMicroseconds + other.cpuMicroseconds) / 2,
    busy: (one.busy + other.busy) / 2
  }
}

interface Start {
  importMs: number
  startMs: number
  /** Resident memory, more than a process without the module takes. */
  megabytes: number
}

/** Starts processes with and without the module, side by side. */
async function measureStarts(module: string): Promise<Start[]> {
  const starts: Start[] = []
  for (let count = 0; count < STARTS; count++) {
    const bare = await ServerProcess.start(BARE_HTTP)
    const monitor = await ServerProcess.start(module)
    await pause(SETTLED_MS)
    const bareUsage = await bare.usage()
    const monitorUsage = await monitor.usage()
    bare.end()
    monitor.end()

    const { importMs, startMs } = monitor.started
    const megabytes = (monitorUsage.rssBytes - bareUsage.rssBytes) / 2 ** 20
    starts.push({ importMs, startMs, megabytes })
  }
  return starts
}

// --- The table -----------------------------------------------------------------------------------

const EXPLANATION = `
Ratios are to the bare server, the first of each group: of answers a second, and of the CPU time
that the server's process takes for one answer. "busy" is that process's share of a core. One at a
time is judged by the rate, as the server waits for the client; the others by CPU time, to which it
does not matter who else uses the machine.
`

interface Spread {
  median: number
  /** The median with the quartiles. */
  text: string
}

function spread(values: number[], digits: number): Spread {
  const sorted = values.toSorted((one, other) => one - other)
  const at = (share: number): number => sorted[Math.round(share * (sorted.length - 1))] ?? NaN
  const median = at(0.5)
  const quartiles = `${at(0.25).toFixed(digits)}-${at(0.75).toFixed(digits)}`
  return { median, text: `${median.toFixed(digits)} (${quartiles})` }
}

const WIDTHS = [38, 10, 21, 8, 21, 6]

function printRow(...cells: string[]): void {
  const padded = cells.map((cell, index) => cell.padEnd(WIDTHS[index] ?? 0))
  console.log(padded.join('').trimEnd())
}

/** A line for each server: its rate, its CPU time for an answer, and how both compare. */
function printComparison(comparison: Comparison, servers: string[], rounds: Round[]): void {
  console.log(comparison.title)
  const bareRuns = rounds.map((round) => round[0]!)
  for (const [index, server] of servers.entries()) {
    const runs = rounds.map((round) => round[index]!)
    const rateRatio = ratio(runs, bareRuns, (run) => run.perSecond)
    const cpuRatio = ratio(bareRuns, runs, (run) => run.cpuMicroseconds)
    const isCompared = index > 0

    printRow(
      `  ${nameOf(server)}`,
      medianOf(runs, (run) => run.perSecond).toFixed(0),
      isCompared ? rateRatio.text : '',
      medianOf(runs, (run) => run.cpuMicroseconds).toFixed(1),
      isCompared ? cpuRatio.text : '',
      medianOf(runs, (run) => run.busy).toFixed(2),
      isModule(server) ? judge(comparison, rateRatio, cpuRatio) : ''
    )
    if (comparison.question === 'own' && isCompared) printOwn(runs, bareRuns)
    if (comparison.hasPeers && isModule(server)) printCosts(runs, servers, rounds)
  }
}

function medianOf(runs: Run[], value: (run: Run) => number): number {
  return spread(runs.map(value), 0).median
}

function ratio(upper: Run[], lower: Run[], value: (run: Run) => number): Spread {
  const ratios = upper.map((run, index) => value(run) / value(lower[index]!))
  return spread(ratios, 3)
}

function judge({ target, atATime }: Comparison, rateRatio: Spread, cpuRatio: Spread): string {
  if (target === undefined) return ''
  const { median } = atATime === 1 ? rateRatio : cpuRatio
  return `${target.toFixed(2)} ${median >= target ? 'ok' : 'short'}`
}

/** What a request of the host's own costs more with the monitor than without. */
function printOwn(runs: Run[], bareRuns: Run[]): void {
  const more = runs.map((run, index) => run.cpuMicroseconds - bareRuns[index]!.cpuMicroseconds)
  const { median, text } = spread(more, 2)
  const verdict = median <= OWN_TARGET_MICROSECONDS ? 'ok' : 'short'
  console.log(`    more CPU µs: ${text}, target ${OWN_TARGET_MICROSECONDS} ${verdict}`)
}

/** What a check costs when one of the bare server, or of a peer, costs 1. */
function printCosts(runs: Run[], servers: string[], rounds: Round[]): void {
  for (const [index, server] of servers.entries()) {
    const isBare = index === 0
    if (!isBare && !peerNamed(server)) continue

    const otherRuns = rounds.map((round) => round[index]!)
    const { median, text } = ratio(runs, otherRuns, (run) => run.cpuMicroseconds)
    const verdict = median < 1 ? 'ok' : 'short'
    const target = isBare ? '' : `, target below 1 ${verdict}`
    console.log(`    CPU where ${server} takes 1: ${text}${target}`)
  }
}

async function printStarts(module: string): Promise<void> {
  const starts = await measureStarts(module)
  console.log(`processes with and without ${nameOf(module)}`)
  for (const [title, value] of Object.entries(START_MEASURES)) {
    printRow(`  ${title}`, spread(starts.map(value), 1).text)
  }
}

const START_MEASURES: Record<string, (start: Start) => number> = {
  'import (node:http being there), ms': (start) => start.importMs,
  'start, ms': (start) => start.startMs,
  'resident memory, more, MiB': (start) => start.megabytes
}

function nameOf(server: string): string {
  return isModule(server) ? relative('.', server) : server
}

// --- The program ---------------------------------------------------------------------------------

/** The modules to measure: those that are named, or the one that was built with this file. */
function findModules(named: string[]): string[] {
  if (named.length > 0) return named.map((path) => resolve(path))

  const fromEnvironment = process.env['BENCH_MODULE']
  if (fromEnvironment !== undefined) return [resolve(fromEnvironment)]

  const besideThisFile = new URL(`../monitor${extname(import.meta.url)}`, import.meta.url)
  return [fileURLToPath(besideThisFile)]
}

async function measure(comparisons: Comparison[], modules: string[]): Promise<Bench> {
  const peers = comparisons.some(({ hasPeers }) => hasPeers) ? await findPeers() : []
  const bench = new Bench(compileClient(), comparisons, modules, peers)
  const startedAt = performance.now()
  for (let count = 0; count < GENERATIONS_MAX; count++) {
    if (count >= GENERATIONS_MIN && performance.now() - startedAt > BUDGET_MS) break
    await bench.runGeneration()
  }
  return bench
}

async function main(named: string[]): Promise<void> {
  if (!hasCompiler()) {
    console.error('The benchmark needs gcc: a client on Node.js would be slower than the server.')
    process.exitCode = 1
    return
  }

  const modules = findModules(named)
  const selected = process.env['BENCH_ONLY'] // a question
  const comparisons = COMPARISONS.filter(({ question }) => (selected ?? question) === question)
  const bench = await measure(comparisons, modules)

  const [rounds = []] = bench.rounds.values()
  console.log(`Node.js ${process.version}; medians of ${rounds.length} rounds (with quartiles)`)
  if (!bench.isPinned)
    console.log('One core, or no taskset: nothing is bound to a core of its own.')
  console.log(EXPLANATION)
  printRow('', 'answers/s', 'rate ratio', 'CPU µs', 'CPU ratio', 'busy', 'target')
  for (const [comparison, taken] of bench.rounds) {
    printComparison(comparison, bench.serversOf(comparison), taken)
  }
  if (selected !== undefined) return
  for (const module of modules) await printStarts(module)
}

const [, , role, ...words] = process.argv
if (role === SERVE) await serve(words[0] ?? '')
else await main(process.argv.slice(2))
