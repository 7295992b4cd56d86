// The tests of ftw-monitor. Each one imports a copy of the module of its own, and speaks to it as
// its users do: by its exports, over lines and over HTTP.
//
// Where does my test go? Into the suite of its subject, below `// --- The verdict` and the like. A
// subject has up to three suites: your test runs ALONE if it touches what belongs to the whole
// process (the environment, the clock, timers), PAIRWISE or SIDE_BY_SIDE if it starts processes, else
// TOGETHER with others. Its name is a sentence about a behaviour, or about several that one instance
// goes through. A table for one subject stands above its suites, a helper for several among the
// helpers, which come first. Do not wait for a limit of the module, nor measure one: move the clock
// (fakeClock) and its timers (takeTimers). For an event, poll (until). What needs a program says so:
// `needs('openssl')`; what takes many seconds is SLOW. What starts processes has a busy machine around
// it: up to six tests at a time, and the other parts.
//
// `node --test --test-name-pattern='The verdict' monitor.test.ts` runs one subject.

import assert from 'node:assert/strict'
import { spawn, spawnSync, type ChildProcess, type StdioOptions } from 'node:child_process'
import dns from 'node:dns'
import { EventEmitter, getEventListeners, once } from 'node:events'
import * as fs from 'node:fs'
import * as http from 'node:http'
import * as http2 from 'node:http2'
import * as https from 'node:https'
import { createRequire } from 'node:module'
import * as net from 'node:net'
import { Readable } from 'node:stream'
import { networkInterfaces, tmpdir } from 'node:os'
import { delimiter, join } from 'node:path'
import { text as readAll } from 'node:stream/consumers'
import { describe, test, type TestContext } from 'node:test'
import { setImmediate as nextTurn, setTimeout as pause } from 'node:timers/promises'
import * as tls from 'node:tls'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import type {
  Command,
  Database,
  DrainOptions,
  Logger,
  WebServer,
  ShutdownOptions,
  StartOptions,
  WarmupPerformer
} from './monitor.ts'

// --- Helpers -------------------------------------------------------------------------------------

type Monitor = typeof import('./monitor.ts')

const EXTENSION = import.meta.url.slice(-3) // .ts, or .js where it is compiled
const MODULE = new URL(`./monitor${EXTENSION}`, import.meta.url)
const PROGRAM = fileURLToPath(MODULE)
const IS_ROOT_HERE = fs.existsSync(new URL('./README.md', import.meta.url))
const ROOT = new URL(IS_ROOT_HERE ? '.' : '..', import.meta.url)
const README_TEXT = fs.readFileSync(new URL('README.md', ROOT), 'utf8')

const IS_SLOW_WANTED = Boolean(process.env['CI'] || process.env['SOAK'])
const SLOW = IS_SLOW_WANTED ? {} : { skip: 'takes long: set CI or SOAK' }
/** By then a suite hangs, and fails: most take seconds, and the slow ones ten minutes. */
const SUITE_LIMIT_MS = (IS_SLOW_WANTED ? 15 : 4) * 60_000

/** `npm test` runs these parts beside each other, each in a process of its own: the suites up to the
 *  databases, those from the warm-up to the wire, and those which start processes. */
const PARTS = ['databases', 'warm-up', 'processes']
/** The part to run; without it all are. */
const TEST_PART = process.env['TEST_PART'] ?? ''
/** The part of the suites that follow, unless they start processes. */
let currentPart = 'databases'

function isPartWanted(wanted: string): boolean {
  return TEST_PART === '' || TEST_PART === wanted
}

function describeInProcess(name: string, how: typeof ALONE, suite: () => void): void {
  if (isPartWanted(currentPart)) void describe(name, { ...how, timeout: SUITE_LIMIT_MS }, suite)
}

/** The suites that start processes, each as a function which declares it to Node's runner. */
const suitesOfProcesses = { besideOthers: [] as (() => void)[], alone: [] as (() => void)[] }

function describeProcesses(name: string, how: typeof ALONE, suite: () => void): void {
  const declare = () => void describe(name, { ...how, timeout: SUITE_LIMIT_MS }, suite)
  if (how === ALONE) suitesOfProcesses.alone.push(declare)
  else suitesOfProcesses.besideOthers.push(declare)
}

/** Two suites at a time, so that nobody waits for the last test of one; then those that run alone.
 *  The last of the file take longest, so they begin. */
function describeAllProcesses(): void {
  if (!isPartWanted('processes')) return
  void describe('Beside each other', { concurrency: 2 }, () => {
    for (const declare of suitesOfProcesses.besideOthers.toReversed()) declare()
  })
  for (const declare of suitesOfProcesses.alone) declare()
}

// How many tests of a suite run beside each other.

/** For a suite whose tests change nothing that belongs to the whole process. */
const TOGETHER = { concurrency: 6 }
/** For a suite whose tests start processes, or keep one busy: two of them fill two cores. */
const PAIRWISE = { concurrency: 2 }
/** The same for those which wait more than they work. */
const SIDE_BY_SIDE = { concurrency: 3 }
/** For a suite whose tests set the environment, the clock or the timers, which belong to the whole
 *  process, or measure times that neighbours would stretch. */
const ALONE = { concurrency: 1 }

/** A parent of a node_modules with express, pg, ws and others, which the package itself does without. */
const PACKAGES = process.env['FTW_MONITOR_TEST_PACKAGES']
const NEEDS_PACKAGES = PACKAGES ? {} : { skip: 'FTW_MONITOR_TEST_PACKAGES is not set' }

/** Skips where a package is missing of which there may be no version for each Node.js. */
function needsPackage(name: string): { skip?: string } {
  if (PACKAGES === undefined) return NEEDS_PACKAGES
  const isThere = fs.existsSync(join(PACKAGES, 'node_modules', name))
  return isThere ? {} : { skip: `${name} is not in ${PACKAGES}` }
}

/** Where the shell finds programs. */
const PATH_FOLDERS = (process.env['PATH'] ?? '').split(delimiter)

/** Skips where a program is missing, unless in CI, where all are to be there. */
function needs(...programs: string[]): { skip?: string } {
  if (process.env['CI']) return {}
  const isMissing = (program: string) => {
    return !PATH_FOLDERS.some((folder) => fs.existsSync(join(folder, program)))
  }
  const missing = programs.find(isMissing)
  return missing === undefined ? {} : { skip: `${missing} is not installed` }
}

/** An address of this machine that is not loopback: connected from it, a peer looks foreign. */
const OUTSIDE = Object.values(networkInterfaces())
  .flat()
  .find((each) => each?.family === 'IPv4' && !each.internal)?.address
const NEEDS_OUTSIDE = OUTSIDE ? {} : { skip: 'this machine has no address but loopback' }

/** In a network of its own a process may do without IPv6, and get addresses later. */
const NETWORK = ['-rn', 'sh', '-c', 'ip link set lo up && eval "$0" && exec "$@"']
const networkTry = [...NETWORK, 'test -w /proc/sys/net/ipv6/conf/all/disable_ipv6', 'true']
const NEEDS_NAMESPACES =
  spawnSync('unshare', networkTry).status === 0
    ? needs('sysctl')
    : { skip: 'this user may not make a network (unshare -rn, ip)' }

const NODE_MAJOR = Number(process.versions.node.split('.')[0])

// Helpers: waiting

/** Polls until something holds, and fails with a sentence when it never does. */
async function until(holds: () => unknown, what: string, limitMs = 20_000): Promise<void> {
  const end = Date.now() + limitMs
  while (!(await holds())) {
    assert.ok(Date.now() < end, `not within ${limitMs} ms: ${what}`)
    await pause(20)
  }
}

/** What a promise gives, if it does so in time. */
async function inTime<T>(promise: Promise<T>, what: string, limitMs = 20_000): Promise<T> {
  return await new Promise((resolve, reject) => {
    const fail = () => reject(new Error(`not within ${limitMs} ms: ${what}`))
    const timer = setTimeout(fail, limitMs)
    promise.finally(() => clearTimeout(timer)).then(resolve, reject)
  })
}

/** Whether a promise is still pending after a while. */
async function isPendingFor(ms: number, promise: Promise<unknown>): Promise<boolean> {
  return (await Promise.race([promise, pause(ms, 'pending')])) === 'pending'
}

async function timeOf(promise: Promise<unknown>): Promise<number> {
  const startedAt = performance.now()
  await promise
  return performance.now() - startedAt
}

/** A promise that is opened by hand. */
function latch() {
  let open = (): void => {}
  const opened = new Promise<void>((resolve) => {
    open = resolve
  })
  return { opened, open }
}

function hang(): Promise<never> {
  return new Promise(() => {})
}

/** Asks in turn, with a pause after each answer, until told to stop, or until the test is over; an
 *  asking that fails is the last, and stop() tells how. */
function keepAsking(t: TestContext, everyMs: number, askOnce: () => Promise<unknown>) {
  let isStopped = false
  const askInTurn = async () => {
    while (!isStopped) {
      await askOnce()
      asker.answers++
      await pause(everyMs)
    }
  }
  const stop = () => {
    isStopped = true
    return done
  }
  const asker = { answers: 0, stop }
  const done = askInTurn()
  done.catch(() => {})
  t.after(() => void stop())
  return asker
}

// Helpers: what belongs to the whole process, so that a test which uses them runs alone

/** What the module reads of the environment, and what it warns of. */
const VARIABLES = /^(PORT|HOST|HOSTNAME|FTW_MONITOR(_.+)?|npm_package_(name|version))$/

/** What colours, translates, widens or re-routes what programs print. Node's runner itself sets
 *  FORCE_COLOR where its own output is a terminal. */
const OF_THE_TERMINAL =
  /^(FORCE_COLOR|NO_COLOR|NODE_DISABLE_COLORS|COLORTERM|CLICOLOR(_FORCE)?|COLUMNS|LINES)$/
const OF_PROGRAMS =
  /^(LANG|LANGUAGE|LC_[A-Z]+|NODE_OPTIONS|NODE_DEBUG|NODE_NO_WARNINGS|PG[A-Z]+|[a-z]+_proxy)$/i

// The environment of whoever runs the tests must not change what they find.
for (const pattern of [VARIABLES, OF_THE_TERMINAL, OF_PROGRAMS]) unsetVariables(pattern)

function unsetVariables(pattern: RegExp): void {
  for (const name of Object.keys(process.env)) {
    if (pattern.test(name)) delete process.env[name]
  }
}

/** Sets variables for a test; the others that the module reads are unset. */
function setEnvironment(t: TestContext, variables: Record<string, string>): void {
  unsetVariables(VARIABLES)
  for (const [name, value] of Object.entries(variables)) {
    process.env[name] = value
    t.after(() => delete process.env[name])
  }
}

/** The clock that the module reads, set by hand; in milliseconds, whole ones to add up exactly. */
function fakeClock(t: TestContext) {
  const clock = { now: Math.ceil(performance.now()) }
  t.mock.method(performance, 'now', () => clock.now)
  return clock
}

interface Timer {
  act: () => void
  periodMs: number
  isRepeated: boolean
  dueAtMs: number
}

/** The module's timers, moved by hand: `pass` lets so much time pass at once, in which each is called
 *  as often as its period says, in the order of time. They are its intervals, and where `kinds` says
 *  so its timeouts: without these, drain() and the like go on by themselves. The clock moves along. */
function takeTimers(
  t: TestContext,
  kinds: ('setInterval' | 'setTimeout')[] = ['setInterval'],
  clock = { now: 0 }
) {
  const NEVER_MS = 2 ** 30
  const timers = new Map<unknown, Timer>()

  for (const kind of kinds) {
    const setForReal = globalThis[kind] as (act: () => void, ms?: number) => NodeJS.Timeout
    const keep = (act: () => void, ms = 0) => {
      const isOurs = new Error('where').stack!.includes(`${MODULE.href}?copy=`)
      if (!isOurs) return setForReal(act, ms)
      const handle = setForReal(() => {}, NEVER_MS)
      const isRepeated = kind === 'setInterval'
      timers.set(handle, { act, periodMs: Math.max(1, ms), isRepeated, dueAtMs: clock.now + ms })
      return handle
    }
    t.mock.method(globalThis, kind, keep as typeof setInterval & typeof setTimeout)
  }
  for (const kind of ['clearInterval', 'clearTimeout'] as const) {
    const clearForReal = globalThis[kind]
    const forget = (handle: NodeJS.Timeout | undefined) => {
      timers.delete(handle)
      clearForReal(handle)
    }
    t.mock.method(globalThis, kind, forget as typeof clearForReal)
  }

  const findNext = () => [...timers].sort(([, one], [, other]) => one.dueAtMs - other.dueAtMs)[0]

  const pass = (ms: number) => {
    const endMs = clock.now + ms
    for (;;) {
      const [handle, timer] = findNext() ?? []
      if (!timer || timer.dueAtMs > endMs) break
      clock.now = Math.max(clock.now, timer.dueAtMs)
      timer.dueAtMs = clock.now + timer.periodMs
      if (!timer.isRepeated) timers.delete(handle)
      timer.act()
    }
    clock.now = endMs
  }

  /** Has the event loop stand still for so long from when the next timer is due. */
  const stall = (ms: number) => {
    const [, timer] = findNext() ?? assert.fail('there is no timer')
    clock.now = timer.dueAtMs + ms
  }
  return { pass, stall, count: () => timers.size }
}

// The copies in a process are one. Here each is to have a state of its own, so that none may find
// what the first one has left for the others.
Object.defineProperty(globalThis, Symbol.for('ftw-monitor.exports.1'), { get: () => undefined })

function listenersOf(emitter: NodeJS.EventEmitter): Record<string, number> {
  const counts = emitter.eventNames().map((name) => [String(name), emitter.listenerCount(name)])
  return Object.fromEntries(counts)
}

/** How many descriptors a process holds; 0 where there is no procfs to tell it. */
function descriptorsOf(pid: number | 'self'): number {
  const folder = `/proc/${pid}/fd`
  return fs.existsSync(folder) ? fs.readdirSync(folder).length : 0
}

// Helpers: servers, ports and files

const hello: http.RequestListener = (_, response) => {
  response.end('hello')
}

const LOOPBACK = { host: '127.0.0.1', port: 0 }

/** An HTTP server that listens, on a free port of loopback unless told otherwise. */
async function serve(t: TestContext, handler = hello, where: net.ListenOptions = LOOPBACK) {
  return await startListening(t, http.createServer(handler), where)
}

/** Has a server of any kind listen, and closes it after the test. */
async function startListening<Server extends net.Server>(
  t: TestContext,
  server: Server,
  where: net.ListenOptions = LOOPBACK
): Promise<Server> {
  closeLater(t, server)
  server.listen(where)
  await once(server, 'listening')
  return server
}

/** Hides a server from a monitor that was not given it, as one of another process is hidden: what
 *  keeps no process alive is not taken for the instance. */
function hide<Server extends net.Server>(server: Server): Server {
  return server.unref()
}

/** A server whose requests to /held wait until they are let go. */
async function serveHeld(t: TestContext, where = LOOPBACK) {
  const held: http.ServerResponse[] = []
  const answer: http.RequestListener = (request, response) => {
    if (request.url === '/held') held.push(response)
    else response.end('served')
  }
  const server = await serve(t, answer, where)
  const letGo = () => {
    for (const response of held.splice(0)) response.end('late')
  }
  return { server, held, letGo }
}

/** Closes a server after the test, whatever still hangs on it. */
function closeLater(t: TestContext, server: net.Server): void {
  // A session that was told to go elsewhere stays open where its client is Node.js's.
  server.on('session', (session: http2.ServerHttp2Session) => t.after(() => session.destroy()))
  t.after(() => {
    server.close()
    if (server instanceof http.Server) server.closeAllConnections()
  })
}

async function close(server: net.Server): Promise<void> {
  await new Promise((resolve) => server.close(resolve))
}

function portOf(server: net.Server): number {
  return (server.address() as net.AddressInfo).port
}

const givenPorts = new Set<number>()

/** The parts of `npm test` have ports of their own, below those that Linux gives to clients. */
const PORTS_OF_PART = 4_000
const FIRST_PORT = 20_000 + PORTS_OF_PART * Math.max(0, PARTS.indexOf(TEST_PART))

/** A free port whose +80 is free too, and which no other test has been given. */
async function freePort(): Promise<number> {
  for (;;) {
    const port = FIRST_PORT + Math.floor(Math.random() * (PORTS_OF_PART - 100))
    if (givenPorts.has(port) || givenPorts.has(port + 80)) continue
    givenPorts.add(port).add(port + 80)
    if ((await isFree(port)) && (await isFree(port + 80))) return port
  }
}

async function isFree(port: number): Promise<boolean> {
  const server = net.createServer().listen(port, '127.0.0.1')
  const outcome: unknown = await once(server, 'listening').catch(codeOf)
  await close(server)
  return typeof outcome !== 'string'
}

async function occupy(t: TestContext, port: number): Promise<net.Server> {
  return await startListening(t, net.createServer(), { host: '127.0.0.1', port })
}

/** A folder of its own, removed after the test. */
function scratchFolder(t: TestContext): string {
  const folder = fs.mkdtempSync(join(tmpdir(), 'ftw-monitor-'))
  t.after(() => fs.rmSync(folder, { recursive: true, force: true }))
  return folder
}

/** A self-signed certificate for a name. */
function certify(t: TestContext, name: string) {
  const folder = scratchFolder(t)
  const keyFile = join(folder, 'key.pem')
  const certFile = join(folder, 'cert.pem')
  const kind = ['-x509', '-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes']
  const subject = ['-subj', `/CN=${name}`, '-addext', `subjectAltName=DNS:${name}`]
  const words = ['req', ...kind, ...subject, '-keyout', keyFile, '-out', certFile]
  const { status, stderr } = spawnSync('openssl', words, { encoding: 'utf8' })
  assert.equal(status, 0, stderr)
  return { keyFile, certFile, key: fs.readFileSync(keyFile), cert: fs.readFileSync(certFile) }
}

// Helpers: an instance in this process

let copies = 0

/** A monitor module of its own, whose state no other test has touched; stopped after the test. */
async function importMonitor(t: TestContext): Promise<Monitor> {
  copies++
  const monitor = (await import(`${MODULE.href}?copy=${copies}`)) as Monitor
  t.after(() => monitor.stop())
  return monitor
}

/** Keeps what is logged, as `level text`; of a blocked event loop only where that is wanted, since a
 *  busy machine, or a clock that is set, looks like one. */
function recorder({ isBlockWanted = false } = {}) {
  const lines: string[] = []
  const keep = (level: string) => (text: string) => {
    const isBlock = text.startsWith('ftw-monitor noticed that the event loop ')
    if (isBlockWanted || !isBlock) lines.push(`${level} ${text}`)
  }
  return { lines, info: keep('info'), warn: keep('warn'), error: keep('error') }
}

function warningsOf({ lines }: { lines: string[] }): string[] {
  return lines.filter((line) => line.startsWith('warn '))
}

function errorsOf({ lines }: { lines: string[] }): string[] {
  return lines.filter((line) => line.startsWith('error '))
}

/** A warm-up that is over at once, so that every request which a server sees is a test's own. */
const WARM: Record<string, WarmupPerformer> = { '/': () => {} }

interface InstanceSetup {
  /** One that was imported before; a new one by default. */
  monitor?: Monitor
  databases?: Record<string, Database>
  performers?: Record<string, WarmupPerformer>
  /** Whatever else is to be registered before the start. */
  prepare?: (monitor: Monitor) => void
  handler?: http.RequestListener
  /** One that listens; by default there is a new one with the handler. */
  server?: WebServer
  /** By default, one that keeps what is logged. */
  logger?: Logger
  /** What start() is told besides: by default, to listen on a free port of loopback. */
  options?: StartOptions
  /** To wait for the address alone, and not for OK. */
  until?: 'started'
  /** Whether the test causes an internal error. */
  isFaulty?: boolean
}

/** What no test may cause unseen. */
const INTERNAL_ERROR = /has an internal error/

/** An instance with its monitor, whose port is `port`. */
async function bootInstance(t: TestContext, setup: InstanceSetup = {}) {
  const { databases = {}, performers = {}, prepare, handler, options } = setup
  const record = recorder()
  if (!setup.isFaulty) t.after(() => assert.doesNotMatch(record.lines.join('\n'), INTERNAL_ERROR))
  const logger = setup.logger ?? record
  const monitor = setup.monitor ?? (await importMonitor(t))
  const server = setup.server ?? (await serve(t, handler))

  prepare?.(monitor)
  for (const [name, database] of Object.entries(databases)) monitor.registerDatabase(name, database)
  for (const [site, performer] of Object.entries(performers)) {
    monitor.registerWarmup(site, performer)
  }

  const address = await monitor.start({ server, listen: LOOPBACK, logger, ...options })
  assert.ok(typeof address === 'object')
  const { port } = address
  if (setup.until !== 'started') await untilVerdict(monitor)
  return { monitor, server, port, instancePort: portOf(server), logger: record }
}

/** Waits for OK on the monitor's port. */
async function untilHealthy(port: number, limitMs?: number): Promise<void> {
  const isHealthy = async () => (await ask(port, 'health_check\n').catch(codeOf)) === 'OK\n'
  await until(isHealthy, 'health_check is OK', limitMs)
}

/** Waits for OK where nobody may count as one who asked for it. */
async function untilVerdict(monitor: Monitor, expected: string | RegExp = 'OK'): Promise<void> {
  const isExpected = async () => {
    const { reason } = await monitor.health()
    return typeof expected === 'string' ? reason === expected : expected.test(reason)
  }
  await until(isExpected, `the verdict is ${expected}`)
}

/** What answers at the monitor port of some instance; gives the port of the instance. */
async function fakeInstance(t: TestContext, answer: (socket: net.Socket) => void): Promise<number> {
  const port = await freePort()
  const server = net.createServer((socket) => {
    t.after(() => socket.destroy())
    socket.on('error', () => {})
    answer(socket)
  })
  await startListening(t, server, { host: '127.0.0.1', port: port + 80 })
  return port
}

// Helpers: the client for lines

interface LineOptions {
  host?: string
  /** The local address to connect from. */
  from?: string
  allowHalfOpen?: boolean
}

interface AskOptions extends LineOptions {
  /** Half-closes after the text. */
  end?: boolean
  limitMs?: number
}

/** A connection to a port, or to the path of a Unix socket. */
function connectTo(where: number | string, options: LineOptions) {
  const { host = '127.0.0.1', from, allowHalfOpen = false } = options
  if (typeof where === 'string') return net.connect({ path: where, allowHalfOpen })
  return net.connect({ port: where, host, allowHalfOpen, localAddress: from })
}

/** Sends text, and gives all that comes back until the other side closes (or `limitMs` is over). */
async function ask(where: number | string, text: string | Buffer, options: AskOptions = {}) {
  const { end = false, limitMs = 20_000 } = options
  const socket = connectTo(where, options).setEncoding('utf8')
  let transcript = ''
  socket.on('data', (part: string) => {
    transcript += part
  })
  const giveUp = () => {
    transcript += '[still open]'
    socket.destroy()
  }
  const timer = setTimeout(giveUp, limitMs)
  socket.on('close', () => clearTimeout(timer))
  if (end) socket.end(text)
  else socket.write(text)
  await once(socket, 'close')
  return transcript
}

async function askTimes(count: number, port: number, text: string, options: AskOptions = {}) {
  for (let time = 0; time < count; time++) await ask(port, text, options)
}

/** A connection that stays open, on which lines go back and forth. */
async function converse(t: TestContext, where: number | string, options: LineOptions = {}) {
  const socket = connectTo(where, options).setNoDelay().setEncoding('utf8')
  const peer = {
    socket,
    /** What has come since the last `hear`. */
    transcript: '',
    isClosed: false,
    say: (text: string) => void socket.write(text),
    hear: async (text: string) => {
      const what = `hear ${JSON.stringify(text)}`
      await until(() => peer.transcript.length >= text.length, what)
      assert.equal(peer.transcript, text)
      peer.transcript = ''
    }
  }
  socket.on('data', (part: string) => {
    peer.transcript += part
  })
  socket.on('error', () => {})
  socket.on('close', () => {
    peer.isClosed = true
  })
  t.after(() => socket.destroy())
  await once(socket, 'connect')
  return peer
}

type Peer = Awaited<ReturnType<typeof converse>>

/** Waits until the monitor has seen what was sent before: it takes things in their order. */
async function untilSeen(port: number): Promise<void> {
  await askTimes(5, port, 'quit\n')
}

async function isRefused(port: number): Promise<boolean> {
  const socket = connectTo(port, {})
  const outcome: unknown = await once(socket, 'connect').catch(codeOf)
  socket.destroy()
  return outcome === 'ECONNREFUSED'
}

/** The code of an error, or its message where it has none. */
function codeOf(error: unknown): string {
  const { code, message } = error as NodeJS.ErrnoException
  return code ?? message
}

// Helpers: the clients for HTTP and HTTP/2

/** An agent keeps connections alive; without one, each request has a connection of its own. */
interface PageOptions extends LineOptions, Pick<http.RequestOptions, 'agent' | 'socketPath'> {
  method?: string
  headers?: Record<string, string>
  body?: string
  limitMs?: number
}

async function getPage(port: number, path: string, options: PageOptions = {}) {
  const { host = '127.0.0.1', from, body = '', limitMs = 20_000, ...others } = options
  const to = { host, port, path, localAddress: from, agent: false, timeout: limitMs, ...others }
  const request = http.request(to)
  request.on('error', () => {}) // which the answer tells
  request.on('timeout', () => request.destroy(new Error(`${path} is not answered in time`)))
  request.end(body)
  const [response] = (await once(request, 'response')) as [http.IncomingMessage]
  const { statusCode: status = 0, headers } = response
  return { status, headers, body: await readAll(response) }
}

/** The head of a GET request, its last empty line included. */
function headOf(path: string, ...headers: string[]): string {
  return [`GET ${path} HTTP/1.1`, 'Host: localhost', ...headers, '', ''].join('\r\n')
}

const ALL_STREAMS = 2 ** 31 - 1

/** The last stream that each session's server will serve, as its first GOAWAY says. */
const lastStreamOf = new WeakMap<http2.ClientHttp2Session, number>()

/** An HTTP/2 session; gives `undefined` where the connection is refused. */
async function connectSession(t: TestContext, port: number, scheme = 'http') {
  const session = http2.connect(`${scheme}://127.0.0.1:${port}`, { rejectUnauthorized: false })
  t.after(() => session.destroy())
  try {
    await once(session, 'connect')
  } catch (error) {
    // On loopback, a server that closes just then makes ECONNRESET of it.
    const { syscall } = error as NodeJS.ErrnoException
    if (syscall === 'connect') return undefined
    throw error
  }
  session.on('error', () => {}) // its streams tell
  session.on('goaway', (_code, lastStream) => {
    if (!lastStreamOf.has(session)) lastStreamOf.set(session, lastStream)
  })
  return session
}

/** What becomes of a stream: its body, or `elsewhere` where the session takes no more. */
async function askStream(
  session: http2.ClientHttp2Session | undefined,
  path = '/'
): Promise<string> {
  if (!session || session.closed || session.destroyed) return 'elsewhere' // by its GOAWAY
  const stream = session.request({ ':path': path })
  let outcome = ''
  stream.setEncoding('utf8').on('data', (part: string) => {
    outcome += part
  })
  stream.on('error', (error) => {
    outcome = `${codeOf(error)} ${error.message}`
  })
  stream.end()
  await new Promise((resolve) => stream.on('close', resolve))
  await pause(20) // by then the session has told of its GOAWAY
  // Node's client refuses the streams itself that it has not sent when it reads a GOAWAY.
  const isStreamRefused = stream.rstCode === http2.constants.NGHTTP2_REFUSED_STREAM
  const isUnsent = isStreamRefused && lastStreamOf.get(session) === ALL_STREAMS
  return isUnsent ? 'elsewhere' : outcome
}

// Helpers: processes

interface ProcessOptions {
  cwd?: string
  env?: Record<string, string>
  stdio?: StdioOptions
}

/** Runs a program, keeps what it says, and ends it after the test. */
function watch(t: TestContext, program: string, words: string[], options: ProcessOptions = {}) {
  const env = { ...process.env, ...options.env }
  const child: ChildProcess = spawn(program, words, { ...options, env })
  const exit = once(child, 'close').then(([status]) => status as number | null)
  const watched = { child, stdout: '', stderr: '', output: '', exit }
  for (const name of ['stdout', 'stderr'] as const) {
    child[name]?.setEncoding('utf8').on('data', (text: string) => {
      watched[name] += text
      watched.output += text
    })
  }
  child.stdin?.on('error', () => {})
  t.after(async () => {
    child.kill('SIGKILL')
    await watched.exit
    assert.doesNotMatch(watched.output, INTERNAL_ERROR)
  })
  return watched
}

async function runToEnd(
  t: TestContext,
  program: string,
  words: string[],
  options: ProcessOptions & { input?: string } = {}
) {
  const watched = watch(t, program, words, options)
  watched.child.stdin?.end(options.input ?? '')
  return { status: await watched.exit, stdout: watched.stdout, stderr: watched.stderr }
}

/** The words by which Node.js runs ftw-monitor's program, from another file where one is given. */
function programWords(words: string[], file = PROGRAM): string[] {
  return ['--no-warnings', file, ...words]
}

function startProgram(t: TestContext, words: string[], env: Record<string, string> = {}) {
  return watch(t, process.execPath, programWords(words), { env })
}

interface ProcessSetup extends ProcessOptions {
  script?: string
  /** Of Node.js. */
  flags?: string[]
  /** What runs Node.js: a program, and its first words. */
  under?: string[]
  /** Whether it runs in a terminal. */
  terminal?: boolean
}

/** For scripts: prints words as they are. console.log would colour a number where colours are on. */
const PRINT = "const print = (...words) => process.stdout.write(words.join(' ') + '\\n')"

/** A process of its own that runs a script, in which `monitor` is the module. */
function runScript(t: TestContext, setup: ProcessSetup) {
  const { script = '', flags = [], under = [], terminal = false, ...options } = setup
  const source = `
    import http from 'node:http'
    import net from 'node:net'
    import { setTimeout as pause, setImmediate as nextTurn } from 'node:timers/promises'
    import * as monitor from ${JSON.stringify(MODULE.href)}
    ${PRINT}
    ${script}`
  const node = [process.execPath, ...flags, '--input-type=module', '-e', source]
  const [program = '', ...words] = terminal
    ? ['script', '-qec', ['exec', ...node.map(quote)].join(' '), '/dev/null']
    : [...under, ...node]
  return watch(t, program, words, options)
}

/** A word as the shell takes it. */
function quote(word: string): string {
  return `'${word.replaceAll("'", `'\\''`)}'`
}

/** For a process in which the monitor's limits, all on one interval, pass so much faster. */
function flagForPace(pace: number): string {
  const source = `
    const interval = setInterval
    globalThis.setInterval = (act, ms, ...rest) => interval(act, ms / ${pace}, ...rest)`
  return `--import=data:text/javascript,${encodeURIComponent(source)}`
}

/** An instance in a process of its own; the script has `server`, and may answer its requests. */
async function bootProcess(t: TestContext, setup: ProcessSetup) {
  const whole = `
    const server = http.createServer()
    ${setup.script ?? ''}
    const hello = (_, response) => response.end('hello')
    if (server.listenerCount('request') === 0) server.on('request', hello)
    server.listen(0, '127.0.0.1')
    const logger = { ...console, info() {} }
    const { port } = await monitor.start({ server, listen: { host: '127.0.0.1', port: 0 }, logger })
    while (!(await monitor.health()).healthy) await pause(20) // who asks may count as a prober
    print('ports', port, server.address().port)`
  const watched = runScript(t, { ...setup, script: whole })
  const ports = /^ports (\d+) (\d+)\n/m
  await until(() => ports.test(watched.output), 'the instance is healthy, and tells its ports')
  const [, port, instancePort] = ports.exec(watched.output) ?? []
  return { watched, port: Number(port), instancePort: Number(instancePort) }
}

/** For an instance that can be asked for its memory, for a reply of 64 KiB, and for none. */
const MEASURED = {
  flags: ['--expose-gc'],
  script: `
    monitor.registerWarmup('/', () => {})
    monitor.register('big', '', (peer) => peer.write('x'.repeat(65_536)))
    monitor.register('never', '', () => new Promise(() => {}))
    const measure = () => {
      globalThis.gc()
      const { heapUsed, external } = process.memoryUsage()
      return heapUsed + external
    }
    monitor.register('collected', '', (peer) => peer.write(measure() + '\\n'))`
}

/** How many bytes are in use in a process that is MEASURED. */
async function askMemory(port: number): Promise<number> {
  return Number(await ask(port, 'collected\n'))
}

// Helpers: services that end

/** What the programs of services and of the law have in common; it comes behind the imports. */
const OPEN_UNTIL_CLEANED = `
  const LOOPBACK = { host: '127.0.0.1', port: 0 }
  let isOpen = true
  const cleanUp = () => {
    isOpen = false
    print('cleaned up')
  }`

/** What every service has: it says `closed` where a request comes after `cleanUp`. */
const SERVICE_PARTS = `
  import https from 'node:https'
  import http2 from 'node:http2'
  import fs from 'node:fs'
  import { promisify } from 'node:util'

  ${OPEN_UNTIL_CLEANED}
  const listening = (server, where = LOOPBACK) =>
    new Promise((resolve) => server.listen(where, () => resolve(server.address().port)))
  let handle = async ({ url }, response) => {
    print('asked for', url)
    if (url === '/hang') return
    if (url === '/stream') return response.write('begun')
    const [, ms] = /^\\/slow(\\d+)$/.exec(url) ?? []
    if (ms) await pause(Number(ms))
    response.end(isOpen ? 'served' : 'closed')
  }
  let server = http.createServer((request, response) => handle(request, response))
  let options = { cleanUp }
  let begin = () => monitor.start({ server, listen: LOOPBACK })
  let listen = () => listening(server)
  monitor.registerWarmup('/', () => {})`

/** A service that shuts down on a signal. A script may replace its `handle`, `server` and `options`,
 *  `begin`, which starts the monitor, and `listen`, which shutdownOnSignal() comes before. */
async function bootService(t: TestContext, setup: ProcessSetup = {}) {
  const script = `
    ${setup.script ?? ''}
    monitor.shutdownOnSignal(options)
    await listen()
    const address = await begin()
    print('ready', server.address()?.port ?? 0, address?.port ?? 0)`
  const service = startService(t, script, setup)
  const { watched } = service
  const readyLine = /^ready (\d+) (\d+)\r?$/m
  const isReady = () => {
    assert.equal(watched.child.exitCode, null, watched.output)
    return readyLine.test(watched.output)
  }
  await until(isReady, 'the service is ready', 30_000)
  const [, instancePort, port] = readyLine.exec(watched.output) ?? []
  return { ...service, port: Number(port), instancePort: Number(instancePort) }
}

/** Runs a service whose script does all by itself. */
function startService(t: TestContext, script: string, setup: ProcessSetup = {}) {
  const flags = ['--no-warnings', ...(setup.flags ?? [])]
  const watched = runScript(t, { ...setup, flags, script: `${SERVICE_PARTS}\n${script}` })

  const hasSaid = (text: string) => {
    return until(() => watched.output.includes(text), `${text}, in: ${watched.output}`)
  }
  const kill = (signal: NodeJS.Signals) => watched.child.kill(signal)
  /** Waits for the end; `status` is null where a signal itself brings it. */
  const awaitEnd = async (limitMs = 20_000) => {
    const startedAt = performance.now()
    const status = await inTime(watched.exit, `the end of ${watched.output}`, limitMs)
    return { status, ms: performance.now() - startedAt, output: watched.output }
  }
  const end = async (signal: NodeJS.Signals = 'SIGTERM', limitMs = 20_000) => {
    kill(signal)
    return await awaitEnd(limitMs)
  }
  /** Ends it by a signal while it serves a request, which must be answered by `body`. */
  const endWhileServing = async (
    port: number,
    path: string,
    { body = 'served', signal }: { body?: string; signal?: NodeJS.Signals | undefined } = {}
  ) => {
    const page = getPage(port, path)
    await hasSaid(`asked for ${path}`)
    const ending = await end(signal)
    assert.equal((await page).body, body)
    return ending
  }
  return { watched, hasSaid, kill, awaitEnd, end, endWhileServing }
}

/** Asks for the verdict until the test is over, and waits until the instance takes us for a prober. */
async function probe(t: TestContext, port: number, everyMs = 100): Promise<void> {
  const prober = keepAsking(t, everyMs, () => ask(port, 'health_check\n'))
  await until(() => prober.answers >= 4, 'it is a prober')
}

/** What the monitor has said since the signal, without its last words, which are always the same. */
function linesOfShutdown(output: string): string[] {
  return output.split('\n').filter((line) => /^ftw-monitor (cuts|failed|is done|exits)/.test(line))
}

/** An upgraded connection, whose client answers nothing and never ends it. */
async function upgradeTo(port: number, socket = connectTo(port, { allowHalfOpen: true })) {
  const peer = { socket, text: '', endedAt: 0 }
  socket.on('data', (part) => {
    peer.text += String(part)
  })
  socket.on('error', () => {})
  socket.on('end', () => {
    peer.endedAt = performance.now()
  })
  socket.write(headOf('/', 'Connection: Upgrade', 'Upgrade: echo'))
  await until(() => peer.text.endsWith('\r\n\r\n'), 'the connection is upgraded')
  peer.text = ''
  return peer
}

/** Ends an instance under keep-alive load, which goes on until it is refused, with a prober by agent
 *  check: none of its requests may fail. */
async function endUnderLoad(
  t: TestContext,
  watched: ReturnType<typeof watch>,
  { port, path }: { port: number; path: string }
) {
  const answers: string[] = []
  keepAsking(t, 100, async () => answers.push(await ask(port + 80, 'agent_check\n')))
  const agent = new http.Agent({ keepAlive: true })
  t.after(() => agent.destroy())
  const outcomes: unknown[] = []
  const askOn = async () => {
    for (;;) {
      try {
        const { status } = await getPage(port, path, { agent })
        outcomes.push(status)
      } catch (error) {
        if ((error as NodeJS.ErrnoException).syscall === 'connect') return
        outcomes.push(codeOf(error))
      }
      await pause(20) // else the kernel might reset what it has accepted and the server has not
    }
  }
  const askers = Array.from({ length: 4 }, askOn)
  await until(() => answers.length >= 4 && outcomes.length > 8, 'it is probed, and serves')
  watched.child.kill('SIGTERM')
  await inTime(Promise.all(askers), `it refuses requests: ${watched.output}`, 40_000)
  await inTime(watched.exit, `it ends: ${watched.output}`)
  const isProberTold = answers.some((answer) => answer.startsWith('stopped'))
  assert.ok(isProberTold, answers.join(''))
  assert.deepEqual(new Set(outcomes), new Set([200]))
}

// Helpers: what commands reply, read as their users do

/** Asks for `monitor AGE …`, and reads the reply as zc.z3monitor's probes do. */
async function askMonitor(port: number, words: string) {
  const reply = await ask(port, `monitor ${words}\n`)
  assert.match(reply, /^-?\d+\nVmRSS:\t[ \d]{7}\d kB\n(\d+\.\d .+\n)*$/)
  const [count, memory, ...lines] = reply.trimEnd().split('\n')
  const [, kilobytes] = memory!.split(/\s+/)
  const open = lines.map((line) => ({
    age: Number(line.split(' ', 1)[0]),
    info: line.slice(line.indexOf(' ') + 1)
  }))
  return { count: Number(count), rss: Number(kilobytes), open }
}

/** Asks for the figures, and holds the reply to its shape: one line, the keys in their order. */
async function askPerfMetrics(port: number, words = '') {
  const reply = await ask(port, `perf_metrics ${words}\n`)
  assert.match(reply, /^\{[^\n]+\}\n$/)
  const metrics = JSON.parse(reply)
  const groups = Object.entries(metrics).map(
    ([group, figures]) => `${group}: ${Object.keys(figures as object).join(' ')}`
  )
  assert.deepEqual(groups, [
    'instance: uptime pid',
    'cache: size ngsize max_size',
    'db: loads stores connections conflicts unresolved_conflicts total_objs size_in_bytes',
    'memory: rss uss pss heap_used heap_total external array_buffers',
    'cpu: user system',
    'loop: utilization',
    'http: in_flight requests errors'
  ])
  return metrics
}

/** The samples of Prometheus's text format, by name and labels. */
function readSamples(text: string): Record<string, number> {
  const lines = text.split('\n').filter((line) => line && !line.startsWith('#'))
  const samples = lines.map((line) => {
    const [, name = '', value] = /^([^ {]+(?:\{.*\})?) ([-+\d.e]+)$/.exec(line) ?? [line]
    return [name, Number(value)]
  })
  return Object.fromEntries(samples)
}

/** Who `drain` waits for, by its first line; the instance is in service again after that. */
async function askWhomItWaitsFor(port: number): Promise<number> {
  const socket = connectTo(port, {}).setEncoding('utf8')
  socket.write('drain\n')
  const [line] = await once(socket, 'data')
  socket.destroy()
  await ask(port, 'resume\n')
  const [, count] = /^Draining: 0 of (\d+) probers know/.exec(line) ?? []
  return Number(count)
}

// Helpers: what strangers and a careless host do

const UNSAFE = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/u

/** Control characters that hide text, move the cursor or end a line. */
const EVIL = 'a\x1b[31mred\x07\u009b2J\u202eright to left\u2028line\0nul\rreturn'

const thrower = () => {
  throw new Error('trap')
}

/** A handler for a Proxy which fails whatever is done with it. */
const TRAPS = Object.fromEntries(Reflect.ownKeys(Reflect).map((name) => [name, thrower]))

/** An object some of whose properties fail as soon as they are read. */
function trapped(names: string[], target: object = {}): object {
  const properties = names.map((name) => [name, { get: thrower }])
  return Object.defineProperties(target, Object.fromEntries(properties))
}

/** A small generator of numbers from 0 to 1, the same ones for the same seed. */
function seeded(seed: number): () => number {
  let state = seed
  return () => {
    state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0
    return state / 2 ** 32
  }
}

// Helpers: forms of answering, and upgraded connections

const UPGRADED = 'HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n'

/** Upgrades a connection, and refuses it by destroying or ending its socket. */
function echoUpgrades(server: net.Server): void {
  server.on('upgrade', ({ url }: http.IncomingMessage, socket: net.Socket) => {
    socket.on('error', () => {})
    if (url === '/destroy') socket.destroy()
    else if (url === '/426') socket.end('HTTP/1.1 426 Upgrade Required\r\n\r\n')
    else socket.pipe(socket).write(UPGRADED)
  })
}

/** A connection to a port that is upgraded. */
async function upgrade(t: TestContext, port: number): Promise<Peer> {
  const peer = await converse(t, port)
  peer.say(headOf('/', 'Connection: Upgrade', 'Upgrade: echo'))
  await peer.hear(UPGRADED)
  return peer
}

// Helpers: what several subjects share

/** Has a server upgrade connections of which we hear no more; gives its ends of them. */
function takeUpgradesBare(server: net.Server): net.Socket[] {
  const upgraded: net.Socket[] = []
  server.on('upgrade', (_, socket: net.Socket) => {
    socket.removeAllListeners()
    socket.on('error', () => {})
    socket.write(UPGRADED)
    upgraded.push(socket)
  })
  return upgraded
}

/** How many requests the instance has begun to serve. */
async function askRequests(port: number): Promise<number> {
  return (await askMetrics(port))['ftw_monitor_http_requests_total'] ?? NaN
}

async function askMetrics(port: number): Promise<Record<string, number>> {
  return readSamples(await ask(port, 'metrics\n'))
}

/** The page that a browser gets at the monitor's root. */
function openPage(port: number, options: PageOptions & { path?: string } = {}) {
  const { path = '/', headers = {}, ...others } = options
  return getPage(port, path, { headers: { Accept: 'text/html', ...headers }, ...others })
}

/** Asks for /status, and holds it to the health check response format. */
async function askHealthJson(port: number, options: PageOptions = {}) {
  const { status, headers, body } = await getPage(port, '/status', options)
  assert.equal(headers['content-type'], 'application/health+json')
  const json = JSON.parse(body)
  const checks = Object.values<Record<string, unknown>[]>(json.checks).flat()
  for (const { status: grade, observedValue, observedUnit, time } of checks) {
    assert.match(String(grade), /^(pass|warn|fail)$/)
    assert.equal(typeof observedValue, 'number')
    assert.match(String(observedUnit), /^\w+$/)
    assert.equal(new Date(String(time)).toISOString(), time)
  }
  return { status, json }
}

/** The reasons of the last changes, in their order. */
async function reasonsOf(monitor: Monitor): Promise<string[]> {
  return (await monitor.status()).changes.map(({ reason }) => reason)
}

/** Performers of these sites: they keep who is called, wait for the gate, and fail as they are told. */
function recordSites(...sites: string[]) {
  const record = {
    calls: [] as string[],
    gate: latch(),
    /** What goes wrong with a site. */
    failures: {} as Record<string, unknown>,
    performers: {} as Record<string, WarmupPerformer>
  }
  record.gate.open()
  for (const each of sites) {
    record.performers[each] = async ({ site }) => {
      record.calls.push(site)
      await record.gate.opened
      if (site in record.failures) throw record.failures[site]
    }
  }
  return record
}

const READY = { options: { listen: LOOPBACK, healthPath: '/ready' }, performers: WARM }

/** Asks for the verdict as a prober does, so many times from this address. */
async function askAsProber(port: number, from = '127.0.0.2', times = 1): Promise<void> {
  await askTimes(times, port, 'health_check\n', { from })
}

/** Sends requests regardless of the answers, each on a connection of its own, until one is refused;
 *  every other one is a POST. */
function loadUntilRefused(t: TestContext, port: number, path: string, everyMs: number) {
  const load = { sent: 0, served: 0, refusedAt: 0, failures: [] as string[] }

  const sendOne = async (options: PageOptions) => {
    const outcome = await getPage(port, path, options).then(({ status }) => String(status), codeOf)
    if (outcome === 'ECONNREFUSED') {
      load.refusedAt ||= performance.now()
      return
    }
    load.sent++
    if (outcome === '200') load.served++
    else load.failures.push(outcome)
  }

  const sendAll = async () => {
    const all: Promise<void>[] = []
    while (!t.signal.aborted && load.refusedAt === 0) {
      all.push(sendOne(all.length % 2 === 0 ? {} : { method: 'POST', body: 'a=1' }))
      await pause(everyMs)
    }
    await Promise.all(all)
  }
  return { load, done: sendAll() }
}

const TELLS_OF_SIGNAL = "options.onSignal = ({ signal }) => print('told', signal)"

const INTERACTIVE = 'Interactive mode on.  Use "quit" To exit.\n'

/** Sends each text on a connection of its own; what comes back until the end must be as given. */
async function assertReplies(
  where: number | string,
  replies: Record<string, string | RegExp>,
  options: AskOptions = {}
): Promise<void> {
  for (const [text, expected] of Object.entries(replies)) {
    const reply = await ask(where, text, options)
    if (typeof expected === 'string') assert.equal(reply, expected, JSON.stringify(text))
    else assert.match(reply, expected, JSON.stringify(text))
  }
}

/** For a process whose timeouts of these lengths are over a hundred times as soon. */
function flagForTimeouts(...limitsMs: number[]): string {
  const source = `
    const timeout = setTimeout
    const isQuick = (ms) => [${limitsMs.join()}].includes(ms)
    globalThis.setTimeout = (act, ms, ...rest) => timeout(act, isQuick(ms) ? ms / 100 : ms, ...rest)`
  return `--import=data:text/javascript,${encodeURIComponent(source)}`
}

/** The first block of the README in this language that has this text. */
function readmeBlock(language: string, text = ''): string {
  for (const [, kind, block = ''] of README_TEXT.matchAll(/^```(\w*)\n([^]*?)^```$/gm)) {
    if (kind === language && block.includes(text)) return block
  }
  assert.fail(`there is no ${language} with ${text}`)
}

// --- Start and stop ------------------------------------------------------------------------------

describeInProcess('Start and stop', TOGETHER, () => {
  test("a copied file, and the build for CommonJS, say which version they are: the package's", async (t) => {
    const monitor = await importMonitor(t)
    const inPackage = fs.readFileSync(new URL('package.json', ROOT), 'utf8')
    const { version } = JSON.parse(inPackage) as { version: string }
    assert.equal(monitor.VERSION, version)
    const source = fs.readFileSync(new URL('monitor.ts', ROOT), 'utf8')
    const head = source.split('\n').slice(0, 6).join('\n')
    assert.ok(head.includes(`Version ${version}. Copyright (c) `) && head.includes('License'), head)

    if (EXTENSION === '.ts') return // there is no build of the source as it stands
    const required = createRequire(import.meta.url)('./monitor.cjs') as Monitor
    assert.equal(required.VERSION, version)
    assert.deepEqual(Object.keys(required).toSorted(), Object.keys(monitor).toSorted())
  })

  test('what the caller passes wrongly rejects with a sentence that names what is taken, and start works again', async (t) => {
    const monitor = await importMonitor(t)
    const surplus: object = { surplus: 5 }
    const ofDrain = 'reason, fall, timeoutMs, minimumMs'
    const ofShutdown = `${ofDrain}, onSignal, cleanUp, exitAfterMs, signals`
    const ofStart = 'server, port, url, listen, local, logger, healthPath, keepAliveMs'
    const whoTakes = 'start() takes an http.Server (app.listen() of Express, fastify.server), or'
    const calls: [who: string, options: string, call: () => unknown][] = [
      [whoTakes, ofStart, () => monitor.start(surplus)],
      ['untilHealthy takes', 'signal', () => monitor.untilHealthy(surplus)],
      ['drain takes', ofDrain, () => monitor.drain(surplus)],
      ['a shutdown takes', ofShutdown, () => monitor.shutdown(surplus)],
      ['a check takes', 'optional', () => monitor.registerCheck('a', hang, surplus)],
      ['a command takes', 'http, local', () => monitor.register('a', '', hang, surplus)]
    ]
    for (const [who, options, call] of calls) {
      const takes = `${who} an object with any of ${options}`
      const message = `ftw-monitor: there is no option surplus: ${takes}`
      await assert.rejects(async () => await call(), { name: 'TypeError', message })
    }

    const start = monitor.start as (options: unknown) => Promise<unknown>
    for (const options of [42, '8080', null, () => {}]) {
      const message = `ftw-monitor: ${whoTakes} an object with any of ${ofStart}`
      await assert.rejects(start(options), { name: 'TypeError', message })
    }

    const logger = recorder()
    const servesNothing = net.createServer()
    const servers = [{}, 8080, servesNothing, [http.createServer(), servesNothing]]
    const endpoints = ['localhost', { port: '1' }, { port: 70_000 }, { host: 1 }, { path: 1 }]
    const wrong: [option: string, sentence: string, values: unknown[]][] = [
      ['server', 'server must be an http, https or http2 server, or a list of them', servers],
      ['port', 'port must be a number from 1 to 65535', ['8080', 65_536, -1, 1.5, NaN]],
      ['port', 'the monitor belongs at port + 80, which is no port: say port or listen', [65_500]],
      ['url', 'url must be an http or https URL, without query', ['not a url', 42, 'ftp://a']],
      ['listen', 'listen must be { host, port } or { path }', [...endpoints, () => {}]],
      ['healthPath', 'healthPath must be a path, as /ready', ['ready', '//ready', '/ready?a', 7]],
      ['logger', 'logger must have info, warn and error', ['console', {}]]
    ]
    for (const [option, sentence, values] of wrong) {
      for (const value of values) {
        const isRange = option === 'port' && typeof value === 'number'
        const name = isRange ? 'RangeError' : 'TypeError'
        const message = `ftw-monitor: ${sentence}`
        await assert.rejects(start({ port: 8080, logger, [option]: value }), { name, message })
      }
    }
    assert.deepEqual(logger.lines, [])
    await bootInstance(t, { monitor })
  })

  test('stop() closes all connections and leaves nothing but what was registered, and start works again', async (t) => {
    const monitor = await importMonitor(t)
    const server = await serve(t)
    const warmUp = t.mock.fn(() => {})
    monitor.registerWarmup('/', warmUp)
    let isConnected = true
    monitor.registerDatabase('main', { isConnected: () => isConnected })
    monitor.register('mine', '', (connection) => connection.write('still here\n'))

    for (let round = 1; round <= 3; round++) {
      const { port, logger } = await bootInstance(t, { monitor, server })
      assert.equal(warmUp.mock.callCount(), round)
      assert.equal(await ask(port, 'mine\n'), 'still here\n')

      const again = await monitor.start({ server, logger: recorder() })
      assert.deepEqual(again, { address: '127.0.0.1', family: 'IPv4', port })
      assert.equal(warningsOf(logger).length, 1)

      const peers: Peer[] = []
      for (const begin of ['', 'inter', 'interactive\n']) {
        const peer = await converse(t, port)
        peer.say(begin)
        peers.push(peer)
      }
      await peers[2]?.hear('Interactive mode on.  Use "quit" To exit.\n')
      await inTime(monitor.stop(), 'it is stopped')
      await until(() => peers.every(({ isClosed }) => isClosed), 'all connections are closed')
      assert.ok(await isRefused(port))
      assert.equal((await getPage(portOf(server), '/@@warmup')).body, 'hello')
      assert.deepEqual(await monitor.health(), { healthy: false, reason: 'Instance is booting' })
    }
    isConnected = false
    assert.equal((await monitor.health()).reason, "Error: Database 'main' disconnected.")
  })

  test('stop() leaves no listener on kept-alive connections, and alone what somebody hooked into the server later', async (t) => {
    const server = await serve(t)
    server.keepAliveTimeout = 60_000
    const askWarmup = async () => (await getPage(portOf(server), '/@@warmup')).body
    const connect = async () => {
      const accepted = once(server, 'connection')
      const peer = await converse(t, portOf(server))
      peer.say(headOf('/'))
      await until(() => peer.transcript.endsWith('hello'), 'it is served')
      const [socket] = (await accepted) as [net.Socket]
      await until(() => socket.listenerCount('finish') === 0, 'the response lets go of it')
      return socket
    }
    const early = await connect()
    const before = listenersOf(early)
    const { monitor } = await bootInstance(t, { server, performers: WARM })

    const ours = server.emit
    const events: unknown[] = []
    const theirs = function (this: http.Server, ...all: unknown[]) {
      events.push(all[0])
      return Reflect.apply(ours, this, all) as boolean
    }
    server.emit = theirs
    const late = await connect()
    assert.equal(await askWarmup(), 'Warmup successful\n')
    await monitor.stop()
    assert.deepEqual([listenersOf(early), listenersOf(late)], [before, before])
    assert.equal(await askWarmup(), 'hello')

    await bootInstance(t, { monitor, server })
    assert.equal(await askWarmup(), 'Warmup successful\n')
    await connect()
    assert.equal(events.filter((event) => event === 'request').length, 4)
    await monitor.stop()
    assert.equal(server.emit, theirs)
  })

  test('stop() aborts a warm-up, at which start() may begin anew, ends a start that waits, and may be called twice', async (t) => {
    const monitor = await importMonitor(t)
    await monitor.stop() // though nothing has begun
    const options = { server: await serve(t), listen: LOOPBACK, logger: recorder() }
    const begun = latch()
    let again: ReturnType<Monitor['start']> | undefined
    monitor.registerWarmup('/', ({ signal }) => {
      begun.open()
      if (again) return
      signal.addEventListener('abort', () => {
        again = monitor.start(options)
      })
      return hang()
    })
    await monitor.start(options)
    await begun.opened
    await monitor.stop()
    assert.ok(typeof (await again) === 'object')
    await untilVerdict(monitor)
    await Promise.all([monitor.stop(), monitor.stop()])

    const later = http.createServer()
    const started = monitor.start({ server: later, logger: recorder() })
    await monitor.stop()
    assert.equal(await inTime(started, 'start gives up'), false)
    assert.equal(Object.hasOwn(later, 'emit'), false)
  })

  test('a logger that throws or rejects is no reason to fail', async (t) => {
    for (const fail of [thrower, async () => thrower()]) {
      const say = t.mock.fn(fail)
      const performers = { '/': thrower }
      const logger = { info: say, warn: say, error: say }
      const { monitor, port } = await bootInstance(t, { performers, logger, until: 'started' })
      monitor.register('fails', '', thrower)
      await untilVerdict(monitor, 'Warmup failed: trap')
      assert.equal(await ask(port, 'fails\n'), 'Error: trap\n')
      await untilSeen(port)
      assert.ok(say.mock.callCount() >= 4, `${say.mock.callCount()} lines`)
      await monitor.stop()
    }
  })

  test('a server that listens again gets its monitor back at its new port + 80, however soon that is', async (t) => {
    const local = '127.0.0.1'
    const first = await freePort()
    const second = await freePort()
    const { server, held, letGo } = await serveHeld(t, { host: local, port: first })
    const monitor = await importMonitor(t)
    const logger = recorder()
    await monitor.start({ server, logger })
    await untilHealthy(first + 80)

    const moves: [port: number, other: number, host: string | undefined, isAtOnce: boolean][] = [
      [second, first, local, false],
      [second, first, local, false],
      [first, second, local, true],
      [second, first, undefined, true] // the look-up of no host takes no turn
    ]
    for (const [port, other, host, isAtOnce] of moves) {
      const closed = 'info ftw-monitor closed'
      logger.lines.length = 0
      server.close()
      if (!isAtOnce) {
        await until(() => logger.lines.includes(closed), 'the monitor has closed')
        const red = 'info ftw-monitor is red: Instance is shutting down'
        assert.deepEqual(logger.lines, [closed, red])
      }
      await once(server.listen({ port, host }), 'listening')
      await untilHealthy(port + 80)
      assert.ok(await isRefused(other + 80))
      assert.ok(logger.lines.filter((line) => line === closed).length <= 1)
      assert.deepEqual(warningsOf(logger), [])
    }

    const answer = getPage(second, '/held')
    await until(() => held.length > 0, 'a request is in flight')
    server.close()
    assert.equal(await ask(second + 80, 'health_check\n'), 'Instance is shutting down\n')
    await once(server.listen(first), 'listening')
    await untilHealthy(first + 80)
    letGo()
    assert.equal((await answer).body, 'late')

    await monitor.stop()
    assert.equal(Object.hasOwn(server, 'emit'), false)
  })
})

describeInProcess('Start and stop', ALONE, () => {
  test('FTW_MONITOR switches the monitor off: it asks nobody, and is healthy until the end', async (t) => {
    const port = await freePort()
    const monitor = await importMonitor(t)
    const answerNo = t.mock.fn(() => false)
    monitor.registerDatabase('main', { isConnected: answerNo })
    monitor.registerCheck('disk', answerNo)
    for (const value of ['0', 'false', 'no', 'off', 'OFF', 'False']) {
      const unknown = { FTW_MONITOR_TIMEOUT: '5' } // which is no matter where there is no monitor
      setEnvironment(t, { ...unknown, PORT: `${port}`, FTW_MONITOR: value, HOST: '127.0.0.1' })
      await inTime(monitor.untilHealthy(), 'there is nothing to wait for')
      const server = await serve(t, hello, { host: '127.0.0.1', port: await freePort() })
      const logger = recorder()
      assert.equal(await monitor.start({ server, logger }), false)
      assert.equal(Object.hasOwn(server, 'emit'), true) // shutdown() waits for its requests
      assert.equal(await monitor.start({ logger }), false)
      assert.equal(Object.hasOwn(server, 'emit'), false)
      assert.ok((await isRefused(port + 80)) && (await isRefused(portOf(server) + 80)))
      assert.deepEqual(logger.lines, [])
      assert.deepEqual(await monitor.health(), { healthy: true, reason: 'OK' })
    }
    assert.equal(answerNo.mock.callCount(), 0)
    const { healthy, databases } = await monitor.status()
    assert.deepEqual([healthy, databases[0]?.trouble], [true, 'disconnected'])
    await monitor.shutdown()
    assert.equal((await monitor.health()).reason, 'Instance is shutting down')
  })

  test('a process with nothing but the monitor in it, or what waits for health, logs where it listens, and exits by itself', async (t) => {
    const port = await freePort()
    const taken = await freePort()
    await occupy(t, taken)
    const run = (script: string, env: Record<string, string> = {}) =>
      runScript(t, { script, env: { HOST: '127.0.0.1', ...env } })
    const children = [
      run('void monitor.start()', { PORT: String(port) }),
      run('void monitor.start()', { PORT: String(port), FTW_MONITOR_LISTEN: String(taken) }),
      run('void monitor.start()'),
      run('void monitor.untilHealthy()'),
      run('void monitor.start(http.createServer())'),
      run(`
        const server = http.createServer((_, response) => response.end())
        void monitor.start({ server, listen: { port: 0 } })
        server.listen(0, '127.0.0.1')
        await monitor.untilHealthy()
        server.close()`)
    ]
    const statuses = await inTime(Promise.all(children.map(({ exit }) => exit)), 'all have exited')
    const outputs = children.map(({ output }) => output)
    assert.deepEqual(statuses, [0, 0, 0, 0, 0, 0], outputs.join())
    for (const at of [0, 5]) assert.match(outputs[at]!, /listening on 127\.0\.0\.1:\d+\n/)
  })

  test('a server that does not listen within 10 s is warned of once, and gets its monitor when its port is free at last', async (t) => {
    const timers = takeTimers(t)
    const monitor = await importMonitor(t)
    const logger = recorder()
    const holder = await serve(t)
    const port = portOf(holder)
    const server = http.createServer(hello)
    closeLater(t, server)
    const started = monitor.start({ server, logger, listen: LOOPBACK })
    timers.pass(9_000)
    assert.deepEqual(logger.lines, [])
    timers.pass(60_000)
    assert.match(logger.lines.join('\n'), /^warn ftw-monitor .*listen.*$/)

    server.listen(port, '127.0.0.1')
    await assert.rejects(once(server, 'listening'), { code: 'EADDRINUSE' })
    server.close() // emits `close`, though nothing had been listening
    await close(holder)
    server.listen(port, '127.0.0.1')
    assert.ok(typeof (await started) === 'object')
    assert.equal(warningsOf(logger).length, 1)
    await monitor.stop()
    assert.equal(timers.count(), 0)
  })

  test('where nothing listens at a port the log says so after 20 s, and never of what listens', async (t) => {
    setEnvironment(t, { HOST: '127.0.0.1', FTW_MONITOR_AUTOWARMUP: 'off' })
    const timers = takeTimers(t)
    const begin = async (instance: StartOptions) => {
      const logger = recorder()
      const monitor = await importMonitor(t)
      void monitor.start({ listen: LOOPBACK, logger, ...instance })
      return { logger, monitor }
    }
    const port = await freePort()
    const there = await begin({ port: portOf(hide(await serve(t))) })
    const nowhere = await begin({ port })
    const given = await begin({ server: await serve(t) })
    await untilVerdict(there.monitor)
    const all = [there, nowhere, given]
    const warningsAfter = (ms: number) => {
      timers.pass(ms)
      return all.flatMap(({ logger }) => warningsOf(logger))
    }
    assert.deepEqual(warningsAfter(19_500), [])
    const warning = `warn ftw-monitor finds nothing at http://127.0.0.1:${port}`
    assert.deepEqual(warningsAfter(500), [warning])
  })
})

// --- Addresses -----------------------------------------------------------------------------------

describeInProcess('Addresses', ALONE, () => {
  test('where the monitor listens is up to `listen`, FTW_MONITOR_LISTEN, or else the instance, the last at its port + 80', async (t) => {
    const port = await freePort()
    const instancePort = await freePort()
    const local = '127.0.0.1'
    const host = '127.0.0.2'
    const PORT = String(instancePort)
    const server = hide(await serve(t, hello, { host, port: instancePort }))
    const withoutHost: object = { host: undefined, port }
    const rows: [variables: Record<string, string>, StartOptions, address: string, number][] = [
      [{}, { server }, host, instancePort + 80],
      [{ PORT, HOST: host }, {}, host, instancePort + 80],
      [{ FTW_MONITOR_LISTEN: `${port}` }, { server }, host, port],
      [{ FTW_MONITOR_LISTEN: ` ${port} ` }, { server }, host, port],
      [{ FTW_MONITOR_LISTEN: `127.0.0.1:${port}` }, { server }, local, port],
      [{ FTW_MONITOR_LISTEN: `[::1]:${port}` }, { server }, '::1', port],
      [{ FTW_MONITOR_LISTEN: `[::]:${port}` }, { server }, '::', port],
      [{ FTW_MONITOR_LISTEN: '1' }, { server, listen: withoutHost }, host, port],
      [{ FTW_MONITOR_LISTEN: '1' }, { server, listen: { host: local } }, local, instancePort + 80]
    ]
    for (const [variables, options, address, at] of rows) {
      setEnvironment(t, variables)
      const monitor = await importMonitor(t)
      const logger = recorder()
      const isIPv6 = net.isIPv6(address)
      const expected = { address, family: isIPv6 ? 'IPv6' : 'IPv4', port: at }
      assert.deepEqual(await monitor.start({ logger, ...options }), expected)
      const shown = isIPv6 ? `[${address}]` : address
      assert.equal(logger.lines[0], `info ftw-monitor listening on ${shown}:${at}`)
      await untilVerdict(monitor)
      await monitor.stop()
    }

    setEnvironment(t, { PORT })
    const monitor = await importMonitor(t)
    assert.ok(await monitor.start({ logger: recorder() }))
    for (const each of [local, host]) {
      const reply = await ask(instancePort + 80, 'health_check\n', { host: each })
      assert.equal(reply, 'Instance is booting\n')
    }
  })

  test('what the environment does not allow is false after one warning without passwords', async (t) => {
    const PORT = String(await freePort())
    const taken = await freePort()
    await occupy(t, taken)
    const urls = [
      'htp://admin:hunter2@localhost:8080',
      'admin:hunter2@localhost:8080',
      'http://admin:hunter2@localhost:8080?',
      'http://admin:hunt er2@local host'
    ]
    const places = ['nonsense', '70000', '/no/such/folder/monitor', `127.0.0.1:${taken}`]
    const advice = /^warn ftw-monitor .*(set|must|unset|try|tries)/
    const local = /LOCAL=sockets: it must be socket; there is no monitor until a restart$/
    const rows: [variable: string, values: string[], warning: RegExp][] = [
      ['PORT', ['abc', '0', '80.5', '-1', '70000', '65500'], advice],
      ['HOST', ['203.0.113.1'], advice],
      ['HOST', ['fe80::1%eth0'], /cannot use http:.*: set FTW_MONITOR_URL/],
      ['FTW_MONITOR_LISTEN', places, advice],
      ['FTW_MONITOR_URL', urls, /^warn .*cannot use FTW_MONITOR_URL=\*\*\*@local/],
      ['FTW_MONITOR_LOCAL', ['sockets'], local]
    ]
    for (const [variable, values, expected] of rows) {
      for (const value of values) {
        setEnvironment(t, { PORT, [variable]: value })
        const monitor = await importMonitor(t)
        const logger = recorder()
        assert.equal(await monitor.start({ logger }), false, value)
        const [warning = '', ...others] = logger.lines
        assert.match(warning, expected)
        assert.doesNotMatch(warning, /hunt|er2/)
        assert.deepEqual(others, [], value)
        await monitor.stop()
      }
    }
  })

  test('an instance on a Unix socket has a monitor where a place is told for it, else none after one warning', async (t) => {
    const path = join(scratchFolder(t), 'instance.sock')
    const onPath = join(scratchFolder(t), 'monitor.sock')
    const port = await freePort()
    const monitorPort = port + 80
    const listen = { host: '127.0.0.1', port: monitorPort }
    const visit = t.mock.fn(hello)
    const server = await serve(t, visit, { path })
    const rows: [options: StartOptions, environment: Record<string, string>, place: unknown][] = [
      [{ server }, {}, false],
      [{}, { PORT: path }, false],
      [{ server, port }, {}, monitorPort],
      [{ listen: { path: onPath } }, { PORT: path }, onPath],
      [{}, { PORT: path, FTW_MONITOR_LISTEN: `127.0.0.1:${monitorPort}` }, monitorPort],
      [{ server }, { PORT: path, FTW_MONITOR_LISTEN: onPath }, onPath]
    ]
    const advice =
      'warn ftw-monitor finds no port at the instance port + 80: set FTW_MONITOR_LISTEN; nothing listens until a restart'
    for (const [options, environment, place] of rows) {
      const what = [...Object.keys(options), ...Object.keys(environment)].join()
      setEnvironment(t, environment)
      const monitor = await importMonitor(t)
      const logger = recorder()
      const address = await monitor.start({ ...options, logger })
      assert.equal(typeof address === 'object' ? address.port : address, place, what)
      assert.deepEqual(warningsOf(logger), place === false ? [advice] : [], what)
      if (place === false) {
        assert.equal(Object.hasOwn(server, 'emit'), true) // shutdown() waits for its requests
        assert.ok(await monitor.start({ ...options, listen, logger }))
      }
      await untilVerdict(monitor)
      const where = place === onPath ? onPath : monitorPort
      assert.equal(await ask(where, 'health_check\n'), 'OK\n', what)
      await monitor.stop()
    }
    assert.equal(visit.mock.callCount(), rows.length, 'each has warmed it up')
  })

  test('without a port of its own the monitor answers health() and the health path, red where it has given up', async (t) => {
    const server = await serve(t)
    const monitor = await importMonitor(t)
    const askReady = async () => {
      const { status, body } = await getPage(portOf(server), '/ready')
      return `${status} ${body}`
    }
    setEnvironment(t, { FTW_MONITOR_LISTEN: 'nonsense', FTW_MONITOR_HEALTH_PATH: '/ready' })
    assert.equal(await monitor.start({ server, logger: recorder() }), false)
    await untilVerdict(monitor)
    assert.equal(await askReady(), '200 OK\n')
    // That there is no such folder is known only when it is tried.
    setEnvironment(t, { FTW_MONITOR_LISTEN: '/nowhere/monitor' })
    assert.equal(await monitor.start({ server, logger: recorder() }), false)
    setEnvironment(t, { FTW_MONITOR_LISTEN: '127.0.0.1:0' })
    assert.equal(typeof (await monitor.start({ server, logger: recorder() })), 'object')
    await monitor.stop()

    setEnvironment(t, { FTW_MONITOR_URL: 'localhost:8080', FTW_MONITOR_HEALTH_PATH: '/ready' })
    assert.equal(await monitor.start({ server, logger: recorder() }), false)
    assert.equal(await askReady(), '503 Error: the monitor gave up\n')
    await inTime(monitor.untilHealthy(), 'it does not wait for what has given up')
    await monitor.stop()
    assert.equal(await askReady(), '200 hello')
  })

  test('with FTW_MONITOR_LOCAL=socket nobody who comes by the port is on this machine', async (t) => {
    setEnvironment(t, { FTW_MONITOR_LOCAL: 'socket' })
    const { monitor, port, server } = await bootInstance(t)
    assert.equal(await ask(port, 'drain pwned\n'), 'drain is for this machine only\n')
    await monitor.stop()
    const path = join(scratchFolder(t), 'monitor')
    await monitor.start({ server, listen: { path }, logger: recorder() })
    assert.match(await ask(path, 'drain\n'), /Drained\n$/)
  })

  test('what is unknown in the environment is in one warning, and no value there makes what code says wrong, or fails the process', async (t) => {
    const unknown = [
      'FTW_MONITOR_TIMEOUT (perhaps FTW_MONITOR_TIMEOUT_MS)',
      'FTW_MONITOR_WARM_UP (perhaps FTW_MONITOR_WARMUP)',
      'FTW_MONITOR_LISTNE (perhaps FTW_MONITOR_LISTEN)',
      'FTW_MONITOR_COLOUR'
    ]
    const variables = unknown.map((words) => [words.split(' ')[0], '5'])
    setEnvironment(t, {
      ...Object.fromEntries(variables),
      FTW_MONITOR_EMPTY: '',
      FTW_MONITOR_LISTEN: '127.0.0.1:0',
      FTW_MONITOR_TIMEOUT_MS: '60000',
      FTW_MONITOR_SERVICE_HOST: '10.0.0.1', // of Kubernetes, as are the next ones
      FTW_MONITOR_PORT: 'tcp://10.0.0.1:8160',
      FTW_MONITOR_PORT_8160_TCP_ADDR: '10.0.0.1'
    })
    const { monitor, logger } = await bootInstance(t)
    monitor.shutdownOnSignal({ exitAfterMs: 28_000 })
    setEnvironment(t, { FTW_MONITOR_TIMEOUT_MS: '28000' })
    monitor.shutdownOnSignal({ exitAfterMs: 28_000 })
    setEnvironment(t, { FTW_MONITOR_TIMEOUT_MS: '2147482000' })
    monitor.shutdownOnSignal()
    setEnvironment(t, {})
    monitor.shutdownOnSignal({ minimumMs: 20_000 })
    monitor.shutdownOnSignal({ minimumMs: 20_001 })
    const range = 'it must be a number of milliseconds from 0 to 604800000'
    assert.deepEqual(warningsOf(logger), [
      `warn ftw-monitor does not know ${unknown.join(', ')}`,
      'warn ftw-monitor cannot use FTW_MONITOR_TIMEOUT_MS=60000: uses 25000 ms, since exitAfterMs is 28000',
      'warn ftw-monitor cannot use FTW_MONITOR_TIMEOUT_MS=28000: uses 25000 ms, since exitAfterMs is 28000',
      `warn ftw-monitor cannot use FTW_MONITOR_TIMEOUT_MS=2147482000: ${range}; uses 25000`,
      'warn ftw-monitor cannot serve for minimumMs of 20001: timeoutMs of 25000 leaves 20000 ms for that; raise timeoutMs'
    ])
  })
})

// --- Listening -----------------------------------------------------------------------------------

describeInProcess('Listening', TOGETHER, () => {
  test("the program's own listen comes before ours, however its place is told", async (t) => {
    const port = await freePort()
    const path = join(scratchFolder(t), 'monitor')
    const server = await serve(t)
    const rows: [listen: NonNullable<StartOptions['listen']>, words: unknown[]][] = [
      [{ port }, [port]],
      [{ port }, [String(port), 'localhost']],
      [{ port }, [{ port, host: '127.0.0.1' }]],
      [{ port }, [{ port: String(port), host: '0.0.0.0' }]],
      [{ path }, [path]]
    ]
    for (const [listen, words] of rows) {
      const monitor = await importMonitor(t)
      const logger = recorder()
      assert.ok(await monitor.start({ server, listen, logger }))
      await untilVerdict(monitor)
      const second = http.createServer(hello)
      closeLater(t, second)
      Reflect.apply(second.listen, second, words)
      await once(second, 'listening')
      const to = 'path' in listen ? { socketPath: path } : {}
      assert.equal((await getPage(port, '/', to)).body, 'hello')
      assert.equal((await monitor.health()).healthy, true)
      const [warning = '', ...others] = warningsOf(logger)
      assert.match(warning, /gives (127\.0\.0\.1:\d+|\/.*) to .*: set FTW_MONITOR_LISTEN/)
      assert.deepEqual(others, [])
      await monitor.stop()
      await close(second)
    }
  })

  test('another copy of this file, which may serve the same server, and a program that listens elsewhere, leave our port alone', async (t) => {
    const { port, server, logger } = await bootInstance(t, { performers: WARM })
    const other = await importMonitor(t)
    assert.equal(await other.start({ server, listen: { port }, logger: recorder() }), false)
    await other.stop()
    await bootInstance(t, { monitor: other, server })
    const places = [[{ port, host: '127.0.0.2' }], [port, '127.0.0.3'], [0], [{ fd: 2 }], []]
    for (const words of [...places, [() => {}]]) {
      const second = net.createServer().on('error', () => {})
      closeLater(t, second)
      Reflect.apply(second.listen, second, words)
    }
    assert.equal(await ask(port, 'health_check\n'), 'OK\n')
    assert.deepEqual(warningsOf(logger), [])
  })
})

describeInProcess('Listening', ALONE, () => {
  test('a place where nobody can listen yet is tried again, quietly, until it is ours', async (t) => {
    const port = await freePort()
    const occupant = await occupy(t, port)
    const path = join(scratchFolder(t), 'monitor')
    const killed = await serve(t, hello, { path: `${path}-of-killed` })
    fs.linkSync(`${path}-of-killed`, path)
    await close(killed)
    const unresolved = new Set(['EAI_AGAIN.invalid', 'ENOTFOUND.invalid'])
    const lookup = dns.lookup as (...words: unknown[]) => void
    t.mock.method(dns, 'lookup', (name: string, ...words: unknown[]) => {
      if (!unresolved.has(name)) return lookup('127.0.0.1', ...words)
      const [code] = name.split('.')
      const answer = words.at(-1) as (error: Error) => void
      process.nextTick(answer, Object.assign(new Error(`getaddrinfo ${code}`), { code }))
    })
    const inUse = /in use.*older process.*; a cluster worker needs its own FTW_MONITOR_LISTEN$/
    const dead = /EADDRINUSE.*tries every second; nobody listens at .*monitor: remove it/
    const late = /cannot listen: .*(EAI_AGAIN|ENOTFOUND).*; tries every second/
    const rows: [where: string, warning: RegExp, release: () => unknown][] = [
      [`127.0.0.1:${port}`, inUse, () => close(occupant)],
      [path, dead, () => fs.rmSync(path)],
      ['EAI_AGAIN.invalid:0', late, () => unresolved.delete('EAI_AGAIN.invalid')],
      ['ENOTFOUND.invalid:0', late, () => unresolved.delete('ENOTFOUND.invalid')]
    ]
    const timers = takeTimers(t)
    const server = await serve(t)
    for (const [where, warning, release] of rows) {
      setEnvironment(t, { FTW_MONITOR_LISTEN: where })
      const monitor = await importMonitor(t)
      const logger = recorder()
      assert.equal(await monitor.start({ server, logger }), false)
      await until(() => warningsOf(logger).length, 'it warns')
      timers.pass(2_000)
      await nextTurn() // by then it has been tried in vain
      const isListening = () => logger.lines.some((line) => line.includes('listening on'))
      assert.equal(isListening(), false)

      await release()
      timers.pass(1_000)
      await until(isListening, 'it listens')
      const [first = '', ...others] = warningsOf(logger)
      assert.match(first, warning)
      assert.deepEqual(others, [])
      await monitor.stop()
    }
  })

  test('after stop(), though a name is still being looked up, and during a shutdown nobody listens any more', async (t) => {
    setEnvironment(t, { FTW_MONITOR_LISTEN: 'slow.invalid:0' })
    const { server, held, letGo } = await serveHeld(t)
    const port = await freePort()
    await occupy(t, port)
    const lookup = t.mock.method(dns, 'lookup', () => {})
    const listen = t.mock.method(net.Server.prototype, 'listen')
    const monitor = await importMonitor(t)
    const logger = recorder()
    const looksUp = monitor.start({ server, logger })
    await until(() => lookup.mock.callCount(), 'the name is looked up')
    const stopped = monitor.stop()
    assert.equal(await isPendingFor(100, stopped), true, 'the port may still be taken')
    await inTime(stopped, 'it stops', 5_000)
    assert.equal(await looksUp, false)

    const answer = lookup.mock.calls[0]!.arguments.at(-1) as (...words: unknown[]) => void
    answer(null, '127.0.0.1', 4)
    const own = listen.mock.calls[0]?.this as net.Server
    await until(() => !own.listening, 'the port is free')
    lookup.mock.restore()

    const timers = takeTimers(t)
    const options = { server, logger, listen: { port } }
    const started = monitor.start(options)
    await monitor.stop() // before Node.js tells that the port is in use
    assert.equal(await started, false)
    assert.deepEqual(logger.lines, [])
    assert.equal(await monitor.start(options), false)
    await monitor.stop()
    listen.mock.resetCalls()
    timers.pass(10_000)
    assert.equal(listen.mock.callCount(), 0)

    assert.equal(await monitor.start(options), false)
    const page = getPage(portOf(server), '/held')
    await until(() => held.length > 0, 'a request is in flight')
    const ended = monitor.shutdown()
    timers.pass(10_000)
    assert.equal(listen.mock.callCount(), 1)
    letGo()
    assert.equal((await page).body, 'late')
    await ended
  })

  test('a connection that cannot be accepted, and a server beside it that closes, change nothing, nor has start() handlers on the process; what cannot listen warns once, and does not connect, either', async (t) => {
    const before = listenersOf(process)
    const listen = t.mock.method(net.Server.prototype, 'listen')
    const { monitor, port, logger } = await bootInstance(t, { performers: WARM })
    const own = listen.mock.calls.at(-1)?.this as net.Server
    const linesBefore = [...logger.lines]
    assert.deepEqual(listenersOf(process), before)
    for (const code of ['EMFILE', 'EADDRINUSE']) {
      own.emit('error', Object.assign(new Error(`accept ${code}`), { code }))
    }
    assert.equal(await ask(port, 'health_check\n'), 'OK\n')

    monitor.shutdownOnSignal() // which takes an interest in all servers
    const other = await serve(t)
    await until(() => Object.hasOwn(other, 'emit'), 'it is seen')
    await close(other)
    assert.equal(await ask(port, 'health_check\n'), 'OK\n')
    assert.deepEqual(logger.lines, linesBefore)

    listen.mock.mockImplementation(thrower)
    const connect = t.mock.method(net.Socket.prototype, 'connect')
    const another = await importMonitor(t)
    const record = recorder()
    assert.equal(await another.start({ port: 8080, logger: record }), false)
    assert.equal(connect.mock.callCount(), 0)
    assert.equal(warningsOf(record).length, 1)
  })
})

// --- Servers that listen -------------------------------------------------------------------------

describeProcesses('Servers that listen', SIDE_BY_SIDE, () => {
  test('each worker of a cluster finds its server, and answers for itself alone; the primary is no instance', async (t) => {
    const port = await freePort()
    const script = `
      const { default: cluster } = await import('node:cluster')
      monitor.shutdownOnSignal(options)
      const started = monitor.start()
      if (cluster.isPrimary) {
        cluster.setupPrimary({ exec: 'worker' }) // which runs the same script
        void started.then(() => process.exit(1)) // it is no instance
        const tell = (code, signal) => print('worker ended', code, signal)
        cluster.fork().on('exit', tell)
        cluster.fork().on('exit', tell)
      } else {
        await listening(server, { host: '127.0.0.1', port: ${port} })
        const { port } = await started
        print('worker', process.pid, port, '')
      }`
    const service = startService(t, script)
    const workers = () => [...service.watched.output.matchAll(/^worker (\d+) (\d*) $/gm)]
    await until(() => workers().length === 2, 'both workers have started')
    const ports = workers().map(([, , monitorPort]) => monitorPort)
    assert.deepEqual(ports.sort(), ['', String(port + 80)])
    assert.equal(service.watched.output.match(/^ftw-monitor .*cluster/gm)?.length, 1)

    for (const [, pid] of workers()) process.kill(Number(pid), 'SIGTERM')
    const { status, output } = await service.awaitEnd()
    assert.deepEqual([status, output.match(/^worker ended 0 $/gm)?.length], [0, 2], output)
  })

  test('listen() is wrapped once, however many copies there are, and by nobody after stop(); a server that has closed is forgotten', async (t) => {
    const script = `
      const before = net.Server.prototype.listen
      const copy = await import(${JSON.stringify(MODULE.href)} + '?copy')
      monitor.shutdownOnSignal() // which takes an interest in all servers
      const started = monitor.start({ listen: LOOPBACK })
      const wrap = net.Server.prototype.listen
      void copy.start({ listen: LOOPBACK })
      print('wrapped once', wrap !== before && net.Server.prototype.listen === wrap)
      await listen()
      await started

      const references = []
      for (let count = 0; count < 20; count++) {
        const passing = http.createServer(() => {})
        await listening(passing)
        while (!Object.hasOwn(passing, 'emit')) await nextTurn() // until it is seen
        await new Promise((resolve) => passing.close(resolve))
        references.push(new WeakRef(passing))
      }
      const countLeft = () => references.filter((reference) => reference.deref()).length
      for (let round = 0; round < 50 && countLeft() > 1; round++) {
        await pause(20)
        globalThis.gc()
      }
      print('forgotten', countLeft() <= 1)

      await copy.stop()
      print('unwrapped', net.Server.prototype.listen === before)
      process.exit()`
    const { output } = await startService(t, script, { flags: ['--expose-gc'] }).awaitEnd()
    const told = ['wrapped once true', 'forgotten true', 'unwrapped true']
    assert.deepEqual(output.match(/^.* (true|false)$/gm), told, output)
  })

  test('where the instance accepts at PORT, but its server is not found, cleanUp waits until it is closed, at most until timeoutMs, and the log says why', async (t) => {
    const elsewhere = await serve(t)
    const boot = (limits: string) =>
      bootService(t, {
        env: { PORT: String(portOf(elsewhere)), HOST: '127.0.0.1' },
        script: `
          ${limits}
          options.onSignal = () => setTimeout(print, 1_400, 'signalled long ago')
          listen = () => {}
          setInterval(() => {}, 1_000) // an instance of another process keeps nobody alive
          begin = async () => {
            await monitor.start({ listen: LOOPBACK })
            await monitor.untilHealthy()
          }`
      })
    const service = await boot('options.timeoutMs = 1_500')
    const { status, output } = await service.end('SIGTERM', 10_000)
    assert.deepEqual(output.match(/long ago|cleaned up/g), ['long ago', 'cleaned up'])
    assert.match(output, /^ftw-monitor .*\bserver\b/m)
    assert.equal(status, 0, output)

    const patient = await boot('Object.assign(options, { timeoutMs: 60_000, exitAfterMs: 90_000 })')
    const ended = patient.end('SIGTERM', 10_000)
    await patient.hasSaid('waits 60 s for requests that it cannot see')
    await close(elsewhere)
    assert.equal((await ended).status, 0)
  })

  test('without PORT start() finds the first server of HTTP that keeps the process alive, or else the next; one that listens later is neither counted nor drained, but has time of its own for its requests, and may be asked by what is in flight', async (t) => {
    const service = await bootService(t, {
      script: `
        Object.assign(options, { timeoutMs: 3_000, minimumMs: 1_000 })
        const answer = (_, response) => response.end('another')
        const first = http.createServer(answer)
        const exporter = http.createServer(answer)
        const later = http.createServer((request, response) => handle(request, response))
        void monitor.start({ listen: LOOPBACK }) // before any server listens
        monitor.register('numbers', '', async (peer) => {
          const { requestsInFlight, url } = await monitor.status()
          peer.write(requestsInFlight + ' at ' + new URL(url).port)
        })
        listen = async () => {
          await listening(http.createServer(answer).unref())
          await new Promise((resolve) => exporter.listen(LOOPBACK, () => resolve(exporter.unref())))
          await listening(first)
          await monitor.untilHealthy()
          await new Promise((resolve) => first.close(resolve))
          await listening(server)
          await monitor.untilHealthy()
          print('later', await listening(later), '')
        }
        begin = () => monitor.start() // tells the address of now
        const handleBefore = handle
        handle = async (request, response) => {
          if (request.url !== '/ask') return await handleBefore(request, response)
          print('asked for /ask')
          while (server._handle.fd !== -1) await pause(20) // the stand-in of a closed socket
          await pause(200) // by then a server beside it would be closed, too
          http.get({ ...later.address(), host: '127.0.0.1', agent: false }, (reply) => {
            reply.pipe(response)
          }).on('error', ({ code }) => response.end(code))
        }`
    })
    const { watched, instancePort, port } = service
    const laterPort = Number(/^later (\d+) $/m.exec(watched.output)?.[1])
    assert.equal(await ask(port, 'numbers\n'), `0 at ${instancePort}`)
    await probe(t, port)
    const endless = assert.rejects(getPage(instancePort, '/hang'))
    await service.hasSaid('asked for /hang')
    const { load, done } = loadUntilRefused(t, laterPort, '/slow400', 50)
    await until(() => load.served > 3, 'the load runs')
    assert.equal(await ask(port, 'numbers\n'), `1 at ${instancePort}`)

    const page = getPage(instancePort, '/ask')
    await service.hasSaid('asked for /ask')
    service.kill('SIGTERM')
    await service.hasSaid('drains: waits for')
    const agent = new http.Agent({ keepAlive: true })
    t.after(() => agent.destroy())
    assert.equal((await getPage(instancePort, '/', { agent })).headers.connection, 'close')
    assert.equal((await getPage(laterPort, '/', { agent })).headers.connection, 'keep-alive')

    const { output } = await service.awaitEnd()
    assert.equal((await page).body, 'served')
    await inTime(done, 'the load is over')
    await endless
    assert.deepEqual([load.failures, load.served], [[], load.sent])
    const cut = 'ftw-monitor cuts 1 request that is still in flight after 3 s: GET /hang'
    assert.deepEqual(linesOfShutdown(output), [cut])
  })

  test('a successor by reusePort takes over the port at the signal, and no prober sees red', async (t) => {
    const [major = 0, minor = 0] = process.versions.node.split('.').map(Number)
    if (major < 22 || (major === 22 && minor < 12)) return t.skip('reusePort came with 22.12')
    const port = await freePort()
    const block = readmeBlock('js', 'reusePort').replace('8080', String(port))
    const script = `
      const { start, stop, shutdownOnSignal, registerWarmup } = monitor
      registerWarmup('/', () => {})
      const server = http.createServer((_, response) => response.end(process.env.NAME))
      ${block}
      while (!(await monitor.health()).healthy) await pause(20)
      print('is warm')`
    const run = async (name: string) => {
      const watched = runScript(t, { script, env: { NAME: name, HOST: '127.0.0.1' } })
      await until(() => watched.output.includes('is warm'), `${name} is warm`)
      return watched
    }
    const older = await run('older')
    await run('newer')
    const verdicts: string[] = []
    const prober = keepAsking(t, 50, async () => {
      verdicts.push(await ask(port + 80, 'health_check\n').catch(codeOf))
    })
    const bodies = new Set<string>()
    const visitor = keepAsking(t, 5, async () => bodies.add((await getPage(port, '/')).body))
    await until(() => prober.answers >= 4 && bodies.size === 2, 'both serve')

    older.child.kill('SIGTERM') // whoever probes cannot be told, so it waits for nobody
    assert.equal(await inTime(older.exit, 'the older one ends', 10_000), 0)
    await untilHealthy(port + 80)
    await prober.stop()
    await visitor.stop()
    const red = verdicts.filter((verdict) => !/^(OK\n|ECONN[A-Z]+)$/.test(verdict))
    assert.deepEqual(red, [])
    const refused = verdicts.filter((verdict) => verdict !== 'OK\n')
    assert.ok(refused.length < 30, 'the port is free for a second at most')
  })
})

// --- The application -----------------------------------------------------------------------------

describeInProcess('The application', TOGETHER, () => {
  test('a server whose emit cannot be wrapped costs one warning, and its monitor starts when it listens', async (t) => {
    const monitor = await importMonitor(t)
    const server = http.createServer(hello)
    Object.defineProperty(server, 'emit', { value: server.emit.bind(server), configurable: false })
    const logger = recorder()
    const started = monitor.start({ server, listen: LOOPBACK, logger })
    await startListening(t, server)
    assert.ok(await inTime(started, 'it starts', 3_000))
    await untilVerdict(monitor)
    const [warning = '', ...others] = warningsOf(logger).filter((line) => line.includes('emit'))
    assert.match(warning, /cannot see the requests of a server whose emit is not/)
    assert.deepEqual(others, [])
    assert.equal((await getPage(portOf(server), '/')).status, 200)
  })

  test('watching requests changes nothing that the application or its clients see', async (t) => {
    const transcripts = async (start: boolean) => {
      const answer = async (request: http.IncomingMessage, response: http.ServerResponse) => {
        const body = await readAll(request)
        const { method, url, headers, trailers, complete } = request
        response.end(JSON.stringify({ method, url, headers, trailers, complete, body }))
      }
      const server = await serve(t, (...both) => void answer(...both))
      server.on('upgrade', (_, socket) => {
        socket.end('HTTP/1.1 101 Changed\r\n\r\nchanged')
      })
      const before = listenersOf(server)
      if (start) await bootInstance(t, { performers: WARM, server })
      assert.deepEqual(listenersOf(server), before)
      const lines = ['/a?b=c', '/@@warmups', '/%40%40warmup'].map((path) => `GET ${path}`)
      const requests = [
        ...[...lines, 'HEAD /a', 'OPTIONS *', 'NONSENSE', 'CONNECT a:1'].map((line) => [line]),
        ['POST /a', 'Content-Length: 5\r\n', 'hello'],
        ['POST /a', 'Expect: 100-continue\r\nContent-Length: 5\r\n', 'hello'],
        ['POST /a', 'Transfer-Encoding: chunked\r\nTrailer: x\r\n', '2\r\nhi\r\n0\r\nx: y\r\n\r\n'],
        ['GET /ws', 'Connection: Upgrade\r\nUpgrade: x\r\n']
      ]
      const replies = []
      for (const [line, rest = '', body = ''] of requests) {
        const closeHeader = rest.includes('Upgrade') ? '' : 'Connection: close\r\n'
        const raw = `${line} HTTP/1.1\r\nHost: a\r\n${rest}${closeHeader}\r\n${body}`
        replies.push(await ask(portOf(server), raw).catch((error: Error) => error.message))
      }
      const pipelined = headOf('/1') + headOf('/2', 'Connection: close')
      replies.push(await ask(portOf(server), pipelined))
      return replies.map((reply) => reply?.replace(/^Date: .*$/gm, 'Date'))
    }
    const alone = await transcripts(false)
    assert.equal(new Set(alone).size, alone.length, 'each request has an answer of its own')
    assert.deepEqual(await transcripts(true), alone)
  })

  test('start([server, other]) counts the requests of both from the start on, and drains both', async (t) => {
    const held: http.ServerResponse[] = []
    const hold = (_: unknown, response: http.ServerResponse) => held.push(response)
    const answer: http.RequestListener = ({ url = '' }, response) => {
      response.writeHead(Number(url.slice(1))).end()
    }
    const server = await serve(t, answer, { host: '127.0.0.1', port: await freePort() })
    server.on('checkExpectation', hold)
    const other = await serve(t, hold)
    const monitor = await importMonitor(t)
    monitor.registerWarmup('/', () => {})
    await monitor.start([server, other])
    await untilVerdict(monitor)
    const port = portOf(server) + 80
    for (const path of ['/200', '/204', '/404', '/499', '/500', '/503', '/@@warmup']) {
      await getPage(portOf(server), path)
    }
    const expected = getPage(portOf(server), '/', { headers: { Expect: 'the best' } })
    await until(() => held.length === 1, 'the first has a request in flight')
    const page = getPage(portOf(other), '/')
    await until(() => held.length === 2, 'the other has one, too')
    assert.deepEqual((await askPerfMetrics(port)).http, { in_flight: 2, requests: 8, errors: 2 })

    const drained = monitor.drain()
    for (const [index, each] of [expected, page].entries()) {
      assert.equal(await isPendingFor(300, drained), true)
      held[index]!.end('late')
      assert.equal((await each).body, 'late')
    }
    await inTime(drained, 'both are drained')
  })

  test('upgraded connections work on and are counted until they are closed, also without their listeners, but none that is refused, too late or not listened for', async (t) => {
    const server = await serve(t)
    echoUpgrades(server)
    const { monitor, port } = await bootInstance(t, { performers: WARM, server })
    const untilCount = (count: number, limitMs?: number) => {
      const line = `\nftw_monitor_upgraded_connections ${count}\n`
      return until(async () => (await ask(port, 'metrics\n')).includes(line), line, limitMs)
    }
    await untilCount(0)
    const peers = []
    for (let time = 0; time < 3; time++) peers.push(await upgrade(t, portOf(server)))
    await untilCount(3)
    assert.equal((await askMonitor(port, '0')).count, 0)

    const [ended, reset, destroyed] = peers
    ended?.say('both ways')
    await ended?.hear('both ways')
    ended?.socket.end()
    await untilCount(2)
    reset?.socket.resetAndDestroy()
    await untilCount(1)
    destroyed?.socket.destroy()
    await untilCount(0)

    const askUpgrade = async (path: string) => {
      return await ask(portOf(server), headOf(path, 'Connection: Upgrade', 'Upgrade: echo'))
    }
    assert.equal(await askUpgrade('/destroy'), '')
    assert.equal(await askUpgrade('/426'), 'HTTP/1.1 426 Upgrade Required\r\n\r\n')
    await ask(portOf(server), 'CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n') // nobody listens for it
    const { socket } = await converse(t, portOf(server))
    socket.destroy()
    await once(socket, 'close')
    for (const each of [socket, { on() {}, destroy() {} }]) {
      server.emit('upgrade', { url: '/destroy' }, each, Buffer.alloc(0))
    }
    await untilCount(0)

    server.removeAllListeners('upgrade')
    const upgraded = takeUpgradesBare(server)
    await upgrade(t, portOf(server))
    assert.equal((await monitor.status()).upgradedConnections, 1)
    upgraded[0]!.destroy()
    await untilCount(0, 5_000)

    server.removeAllListeners('upgrade')
    await monitor.drain()
    assert.match(await askUpgrade('/'), /^Connection: close\r\n[^]*hello/m)
    await untilCount(0)
  })

  test('a layer that fails costs neither the program a request nor the core a count', async (t) => {
    const file = join(scratchFolder(t), `failing${EXTENSION}`)
    const layer = `
      const fail = () => {
        throw new Error('a fault of the layer')
      }
      const hooks = { onEvent: fail, onRequestEnd: fail, inquire: fail, prepareWarmup: fail }
      extend(() => Object.defineProperty(hooks, 'isInquiryDue', { get: fail }))`
    fs.writeFileSync(file, `${fs.readFileSync(PROGRAM, 'utf8')}\n${layer}`)
    const monitor = (await import(file)) as Monitor
    t.after(() => monitor.stop())
    const { server, held, letGo } = await serveHeld(t)
    const { instancePort, logger } = await bootInstance(t, { monitor, server, isFaulty: true })
    const answer = getPage(instancePort, '/held')
    await until(() => held.length === 1, 'a request is in flight')
    assert.equal((await monitor.status()).requestsInFlight, 1)
    letGo()
    assert.equal((await answer).body, 'late')
    assert.equal(errorsOf(logger).length, 1)
    assert.match(errorsOf(logger).join(), /has an internal error: a fault of the layer/)
  })
})

describeInProcess('The application', ALONE, () => {
  test('an emit that is put on the prototype after start() is called for each event, and after stop(), too', async (t) => {
    const { monitor, server, instancePort } = await bootInstance(t, { performers: WARM })
    const { prototype } = http.Server
    const innerEmit = prototype.emit as (...all: unknown[]) => boolean
    const seen: unknown[] = []
    const emit = function (this: http.Server, ...all: unknown[]): boolean {
      if (this === server) seen.push(all[0])
      return Reflect.apply(innerEmit, this, all)
    }
    t.after(() => Reflect.deleteProperty(prototype, 'emit'))
    prototype.emit = emit as typeof prototype.emit // as an instrumentation does
    for (const isStopped of [false, true]) {
      if (isStopped) await monitor.stop()
      seen.length = 0
      assert.equal((await getPage(instancePort, '/')).body, 'hello')
      assert.deepEqual(seen, ['connection', 'request'])
    }
  })

  test('keepAliveMs and its variable keep connections of the instance for longer, until stop()', async (t) => {
    const server = await serve(t)
    server.keepAliveTimeout = 50
    const limits = () => [server.keepAliveTimeout, server.headersTimeout]
    const monitor = await importMonitor(t)
    const logger = recorder()
    const options = { server, listen: LOOPBACK, logger }
    const rows: [variable: string, more: { keepAliveMs?: number }, expected: number[]][] = [
      ['', {}, [50, 60_000]],
      ['long', {}, [50, 60_000]],
      ['75000', {}, [75_000, 76_000]],
      ['75000', { keepAliveMs: 20_000 }, [20_000, 60_000]],
      ['', { keepAliveMs: 604_800_000 }, [604_800_000, 604_801_000]]
    ]
    for (const [variable, more, expected] of rows) {
      setEnvironment(t, { FTW_MONITOR_KEEP_ALIVE_MS: variable })
      await monitor.start({ ...options, ...more })
      assert.deepEqual(limits(), expected)
      await monitor.stop()
      assert.deepEqual(limits(), [50, 60_000])
    }
    assert.match(warningsOf(logger).join(), /cannot use FTW_MONITOR_KEEP_ALIVE_MS=long/)

    await monitor.start(options)
    server.keepAliveTimeout = 30_000
    await monitor.stop()
    assert.deepEqual(limits(), [30_000, 60_000], 'the application has its way')
    for (const keepAliveMs of [-1, NaN, 604_800_001]) {
      await assert.rejects(monitor.start({ ...options, keepAliveMs }), RangeError)
    }
  })

  test('a request that is none is not counted, one of an adapter is, and both are told to the application', async (t) => {
    const timers = takeTimers(t)
    const { monitor, server, port } = await bootInstance(t, READY)
    server.removeAllListeners('request')
    const heard: unknown[] = []
    for (const event of ['request', 'upgrade']) server.on(event, (request) => heard.push(request))
    const emit = server.emit.bind(server) as (...all: unknown[]) => boolean
    const mock = { method: 'GET', headers: {}, httpVersion: '1.1', url: '/x' }
    const ofView = { ...mock, url: '/@@warmup', socket: {} }
    const ofPath = { ...mock, url: '/ready', socket: new EventEmitter() }
    const mocks = [undefined, {}, { url: 7 }, mock, ofView, ofPath]
    for (const request of mocks) {
      emit('request', request, { on() {}, end() {} })
      emit('request', request, new EventEmitter())
      emit('request', request)
      emit('upgrade', request, new EventEmitter(), Buffer.alloc(0))
      emit('upgrade', request)
    }
    assert.equal(heard.length, 5 * mocks.length)
    timers.pass(1_000)
    await inTime(monitor.drain(), 'none of them is waited for')
    assert.match(await ask(port, 'metrics\n'), /^ftw_monitor_http_requests_total 0$/m)

    const socket = Object.assign(new EventEmitter(), { destroy() {} })
    // What an adapter makes may know no request.
    for (const more of [{}, { req: undefined }, { req: {} }, { req: { complete: false } }]) {
      const response = Object.assign(new EventEmitter(), { end() {} }, more)
      emit('request', { ...mock, socket }, response)
      assert.equal((await monitor.status()).requestsInFlight, 1)
      response.emit('close')
      assert.equal((await monitor.status()).requestsInFlight, 0)
    }
  })
})

// --- Sending clients elsewhere -------------------------------------------------------------------

/** A form in which applications answer: what is set header by header, and what writeHead is told, if
 *  it is called; or whatever else they do. */
type Form =
  | { set?: Record<string, string | string[]>; head?: unknown[] }
  | ((response: http.ServerResponse) => unknown)

const FORMS: Record<string, Form> = {
  'implicit headers': {},
  'setHeader of keep-alive': { set: { 'X-A': '1', cONNECTION: 'Keep-Alive', 'X-B': '2' } },
  'setHeader of keep-alive in an array': { set: { Connection: ['keep-alive', 'X-Hop'] } },
  'a reason and an object': { head: [201, 'Made', { 'X-A': '1', 'Set-Cookie': ['a=1', 'b=2'] }] },
  'writeHead of a frozen object': { head: [200, Object.freeze({ Connection: 'keep-alive' })] },
  'names and values in turn': { head: [200, ['X-A', '1', 'Connection', 'keep-alive', 'X-A', '2']] },
  'setHeader before an array': { set: { Connection: 'keep-alive' }, head: [200, ['X-A', '1']] },
  'writeHead of a value that is "connection"': { head: [200, ['X-A', 'connection', 'X-B', '1']] },
  'keep-alive twice': { head: [200, { connecTION: 'KEEP-ALIVE', Connection: 'keep-alive' }] },
  'keep-alive in an array': { head: [200, ['X-A', '1', 'cOnnection', ['keep-alive'], 'X-B', '2']] },
  'Object.entries': { head: [200, Object.entries({ connection: 'keep-alive', 'X-B': '2' })] },
  'writeHead of what is not allowed': { head: [200, { a: 'b\n' }] },
  'writeHead of the prototype': (response) => {
    Reflect.apply(http.ServerResponse.prototype.writeHead, response, [202, { 'X-A': '1' }])
    response.end('ok')
  },
  'Connection: close': { head: [200, { Connection: 'Close' }] },
  'removeHeader of Connection, and all headers shown': (response) => {
    response.setHeader('X-A', '1').removeHeader('Connection')
    response.end(JSON.stringify([response.getHeaders(), response.headersSent]))
  },
  'a stream in chunks': (response) => Readable.from(['one', 'two']).pipe(response),
  '304 that keeps alive': { head: [304, { connection: 'Keep-Alive' }] },
  '426': { head: [426, { Connection: 'keep-alive, Upgrade', Upgrade: 'websocket' }] },
  HEAD: { head: [200, { 'Content-Length': 2 }] },
  'HTTP/1.0 that keeps alive': { head: [200, { 'Content-Length': 2 }] },
  'a body that is read to its end': (response) => {
    response.req.resume().on('end', () => response.end('ok'))
  },
  'an upload that nobody reads': {},
  'an upload that the application closes': (response) => {
    response.shouldKeepAlive = false
    response.writeHead(413).end('too big')
  }
}

/** What is sent for such a form, where that is no GET. */
const REQUESTS: Record<string, string> = {
  HEAD: headOf('/').replace('GET', 'HEAD'),
  'HTTP/1.0 that keeps alive': 'GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n',
  'a body that is read to its end': `${headOf('/', 'Content-Length: 5')}hello`,
  'an upload that nobody reads': `${headOf('/', 'Content-Length: 5').replace('GET', 'POST')}hello`,
  'an upload that the application closes': `${headOf('/', 'Content-Length: 9').replace('GET', 'PUT')}half`
}

/** Answers each request in the form that its header names, as soon as it may. */
async function serveForms(t: TestContext, mayAnswer: Promise<void> = Promise.resolve()) {
  const responses: http.ServerResponse[] = []
  const answer = async (request: http.IncomingMessage, response: http.ServerResponse) => {
    responses.push(response)
    await mayAnswer
    const form = FORMS[String(request.headers['x-form'])]!
    if (typeof form === 'function') {
      form(response)
      return
    }
    const { set = {}, head } = form
    for (const [name, value] of Object.entries(set)) response.setHeader(name, value)
    try {
      if (head) Reflect.apply(response.writeHead, response, head)
      response.end('ok')
    } catch (error) {
      response.end(`threw ${codeOf(error)}`)
    }
  }
  const server = await serve(t, (request, response) => void answer(request, response))
  server.keepAliveTimeout = 500 // for those whom nobody tells to close
  const askAll = async (): Promise<Record<string, string>> => {
    const answers = Object.keys(FORMS).map(async (name) => {
      const asked = REQUESTS[name] ?? headOf('/')
      const text = asked.replace(/ HTTP\/1\.\d\r\n/, `$&X-Form: ${name}\r\n`)
      return [name, await ask(portOf(server), text)]
    })
    return Object.fromEntries(await Promise.all(answers))
  }
  return { server, askAll, responses }
}

describeInProcess('Sending clients elsewhere', TOGETHER, () => {
  test('draining changes no answer but its `Connection`, which closes in its place unless the client still sends', async (t) => {
    const plain = await serveForms(t)
    const drained = await serveForms(t)
    const mayAnswer = latch()
    const inFlight = await serveForms(t, mayAnswer.opened)
    const options = { performers: WARM, until: 'started' } as const
    const first = await bootInstance(t, { ...options, server: drained.server })
    const second = await bootInstance(t, { ...options, server: inFlight.server })

    await first.monitor.drain()
    const asked = [plain.askAll(), drained.askAll(), inFlight.askAll()]
    const count = Object.keys(FORMS).length
    await until(() => inFlight.responses.length === count, 'all are in flight')
    const done = second.monitor.drain({ timeoutMs: 2_000 })
    mayAnswer.open()
    const [plainAnswers = {}, drainedAnswers = {}, inFlightAnswers = {}] = await Promise.all(asked)
    await done

    assert.equal(Object.keys(plainAnswers).length, count)
    const strip = (answer = '') => answer.replace(/^(Date|Keep-Alive): .*\r\n/gim, '')
    const closed = 'HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok'
    assert.equal(strip(drainedAnswers['implicit headers']), closed)
    for (const [name, plainAnswer] of Object.entries(plainAnswers)) {
      assert.match(plainAnswer, /^HTTP\/1\.1 \d/, name)
      const kept = strip(plainAnswer)
      const expected = kept.replace(/^(Connection: )keep-alive/gim, '$1close')
      // Answered at once, while the request might still be sent.
      const isUpload = name.startsWith('an upload')
      assert.equal(strip(drainedAnswers[name]), isUpload ? kept : expected, `${name}, drained`)
      assert.equal(strip(inFlightAnswers[name]), expected, `${name}, in flight`)
    }
  })

  test('of pipelined requests all are answered, and only the last closes; after resume() none does, also of those from before', async (t) => {
    const { server, held, letGo } = await serveHeld(t)
    const { monitor } = await bootInstance(t, { performers: WARM, server, until: 'started' })
    for (const [round, isDrainedBefore] of [true, true, false].entries()) {
      if (isDrainedBefore) await monitor.drain({ timeoutMs: 0 })
      const answers = ask(portOf(server), headOf('/held').repeat(3))
      await until(() => held.length === 3, 'all are in flight')
      if (!isDrainedBefore) await monitor.drain({ timeoutMs: 0 })
      const inOrder = round === 1 ? held.splice(0).reverse() : held.splice(0)
      for (const response of inOrder) response.setHeader('Connection', 'keep-alive').end('ok')
      const connections = [...(await answers).matchAll(/^Connection: (\S+)/gm)]
      const told = connections.map(([, value]) => value)
      assert.deepEqual(told, ['keep-alive', 'keep-alive', 'close'])
      monitor.resume()
    }

    // One packet brings them, and the application answers at once.
    const askThree = async (peer: Peer) => {
      peer.transcript = ''
      peer.say(headOf('/').repeat(3))
      await until(() => peer.transcript.split('served').length === 4, 'all are answered')
    }
    const used = await converse(t, portOf(server))
    await askThree(used)
    await monitor.drain({ timeoutMs: 0 })
    await askThree(used)
    const peer = await converse(t, portOf(server))
    await askThree(peer)

    monitor.resume()
    peer.transcript = ''
    peer.say(headOf('/held'))
    await until(() => held.length === 1, 'a request is in flight')
    await monitor.drain({ timeoutMs: 0 })
    monitor.resume()
    letGo()
    peer.say(headOf('/'))
    await until(() => peer.transcript.endsWith('served'), 'it is served')
    assert.doesNotMatch(peer.transcript, /^Connection: close/m)
  })

  test('an upload that is answered before its body has come gets the answer, though the server closes meanwhile', async (t) => {
    const uploadBytes = 8 * 2 ** 20
    const { server, held } = await serveHeld(t)
    const { monitor, instancePort } = await bootInstance(t, { server, performers: WARM })
    const peer = await converse(t, instancePort, { allowHalfOpen: true })
    peer.say(headOf('/held', `Content-Length: ${uploadBytes}`).replace('GET', 'PUT'))
    await until(() => held.length === 1, 'the upload is in flight')
    void monitor.shutdown()
    await until(() => isRefused(instancePort), 'the server is closed')
    held[0]!.writeHead(401, { 'Content-Length': 7 }).end('not you')
    await pause(100)
    peer.socket.write(Buffer.alloc(uploadBytes))
    const isSent = () => peer.socket.writableLength === 0 && peer.transcript.endsWith('not you')
    await until(() => peer.isClosed || isSent(), 'it is over')
    assert.equal(peer.isClosed, false, 'it is not reset')
    const ms = await timeOf(until(() => peer.socket.readableEnded, 'its connection is ended'))
    assert.ok(ms < 3_000, `${ms} ms`) // its body is no half a head, which would have five seconds
    peer.socket.end()
    const answer = peer.transcript.replace(/^(Date|Connection|Keep-Alive): .*\r\n/gm, '')
    assert.equal(answer, 'HTTP/1.1 401 Unauthorized\r\nContent-Length: 7\r\n\r\nnot you')
  })
})

describeInProcess('Sending clients elsewhere', ALONE, () => {
  test('a response that throws hurts neither the tick nor drain(), and is sent', async (t) => {
    const timers = takeTimers(t)
    const kinds = ['destroyed', 'headersSent', 'getHeader', 'getRawHeaderNames', 'setHeader', '']
    const held: http.ServerResponse[] = []
    const server = await serve(t, ({ url = '' }, response) => {
      response.setHeader('Connection', 'keep-alive')
      const { writeHead } = response
      const name = url.slice(1)
      const trap = { get: thrower, set() {}, configurable: true }
      if (name !== '') Object.defineProperty(response, name, trap)
      else Object.defineProperty(response, 'writeHead', { value: writeHead, writable: false })
      held.push(response)
    })
    server.keepAliveTimeout = 500 // for those who cannot be told to close
    const { monitor } = await bootInstance(t, { performers: WARM, server, until: 'started' })
    const asked = kinds.map((kind) => ask(portOf(server), headOf(`/${kind}`)))
    await until(() => held.length === kinds.length, 'all have come')
    timers.pass(1_000)
    await monitor.drain({ timeoutMs: 0 })
    timers.pass(1_000)
    for (const response of held) {
      Reflect.deleteProperty(response, 'destroyed') // which Node.js reads, too
      response.end('ok')
    }
    for (const [index, answer] of (await Promise.all(asked)).entries()) {
      assert.match(answer, /^HTTP\/1\.1 200 OK\r\n[^]*\r\n\r\nok$/, kinds[index]!)
    }
  })
})

// --- The verdict ---------------------------------------------------------------------------------

describeInProcess('The verdict', TOGETHER, () => {
  test('health_check gives the first reason that applies', async (t) => {
    const monitor = await importMonitor(t)
    const firstTry = latch()
    const secondTry = latch()
    const isConnected = { main: false, other: true }
    let tries = 0
    monitor.registerDatabase('other', { isConnected: () => isConnected.other })
    monitor.registerDatabase('main', { isConnected: async () => isConnected.main })
    monitor.registerWarmup('/', async () => {
      tries++
      if (tries > 1) return secondTry.opened
      await firstTry.opened
      throw new Error('no such table')
    })
    const server = http.createServer()
    const started = monitor.start({ server, logger: recorder(), listen: LOOPBACK })
    const reason = async () => {
      const told = await monitor.health()
      assert.equal(told.healthy, told.reason === 'OK')
      return told.reason
    }
    const noMain = "Error: Database 'main' disconnected."
    assert.equal(await reason(), noMain)
    isConnected.main = true
    assert.equal(await reason(), 'Instance is booting')
    await startListening(t, server)
    const address = await started
    assert.ok(typeof address === 'object')
    const { port } = address

    const set = (name: 'main' | 'other', isIt: boolean) => () => {
      isConnected[name] = isIt
    }
    const steps: [act: () => void, expected: string, warmupState: string][] = [
      [() => {}, 'Warmup in progress', '0 1'],
      [set('other', false), "Error: Database 'other' disconnected.", '0 1'],
      [set('other', true), 'Warmup in progress', '0 1'], // else it would be tried again at once
      [firstTry.open, 'Warmup failed: no such table', '0 0'],
      [set('main', false), noMain, '0 0'],
      [set('main', true), 'Warmup in progress', '0 1'], // it is tried again
      [secondTry.open, 'OK', '1 0'],
      [set('main', false), noMain, '1 0']
    ]
    for (const [act, expected, warmupState] of steps) {
      act()
      await until(async () => (await reason()) === expected, expected)
      assert.equal(await ask(port, 'health_check\n'), `${expected}\n`)
      const isReached = async () => (await ask(port, 'warmup_state\n')) === `${warmupState}\n`
      await until(isReached, `${warmupState} is told with ${expected}`)
    }
    assert.equal(tries, 2)

    server.close()
    assert.equal(await reason(), 'Instance is shutting down')
  })

  test('no text turns a red reply green, or into more than a line of 500 characters', async (t) => {
    let fault: Error | undefined
    const performers = { '/': () => (fault ? Promise.reject(fault) : Promise.resolve()) }
    const { monitor, port, instancePort } = await bootInstance(t, { performers })
    const ofBooks = "Error: Database 'BOO KS' failed: "
    const forged = {
      OK: 'OK',
      'O\\0K': 'O\0K',
      OOKK: 'OOKK',
      'OK on a line': 'no\nOK\n',
      'a soft hyphen': 'O\u00adK',
      'a line separator': 'O\u2028K',
      'OK at the limit': `${'x'.repeat(457)}${'OK'.repeat(30)}`,
      'a megabyte': 'OK '.repeat(349_526)
    }
    for (const [what, text] of Object.entries(forged)) {
      const check = (reply: string, begins: string) => {
        assert.match(reply, /^[^\p{Cc}]{1,500}\n$/u, `${what} after ${begins}`)
        assert.doesNotMatch(reply, /OK/, `${what} after ${begins}`)
        assert.ok(reply.startsWith(begins), `${what} after ${begins}`)
      }
      fault = new Error(text)
      check((await getPage(instancePort, '/@@warmup')).body, 'Warmup failed: ')
      check(await ask(port, 'health_check\n'), 'Warmup failed: ')
      monitor.registerDatabase('BOOKS', { isConnected: () => Promise.reject(fault) })
      check(await ask(port, 'health_check\n'), ofBooks)
      const { healthy, reason } = await monitor.health()
      assert.equal(healthy, false)
      check(`${reason}\n`, ofBooks)

      fault = undefined
      await getPage(instancePort, '/@@warmup')
      monitor.registerDatabase('BOOKS', { isConnected: () => true })
      assert.equal(await ask(port, 'health_check\n'), 'OK\n')
    }
  })

  test('untilHealthy() waits for start() and the warm-up, makes no prober, is over by stop(), and rejects as its signal says and after a shutdown', async (t) => {
    const gate = latch()
    const monitor = await importMonitor(t)
    for (const wrong of [null, 7, { signal: 5 }, { signal: {} }]) {
      await assert.rejects(monitor.untilHealthy(wrong as object), {
        name: 'TypeError',
        message: /^ftw-monitor: .*(untilHealthy takes|signal must be) an /
      })
    }
    const healthy = monitor.untilHealthy()
    assert.ok(await isPendingFor(300, healthy), 'it waits for start()')
    const performers = { '/': () => gate.opened }
    const { port, server } = await bootInstance(t, { monitor, performers, until: 'started' })
    await until(async () => (await ask(port, 'warmup_state\n')) === '0 1\n', 'it warms up')
    assert.ok(await isPendingFor(300, healthy), 'it waits for the warm-up')

    const reason = new Error('enough')
    await assert.rejects(monitor.untilHealthy({ signal: AbortSignal.abort(reason) }), reason)
    const late = new AbortController()
    const unused = new AbortController()
    const aborted = monitor.untilHealthy({ signal: late.signal })
    const alsoHealthy = monitor.untilHealthy({ signal: unused.signal })
    await nextTurn()
    late.abort(reason)
    await assert.rejects(aborted, reason)
    gate.open()
    await inTime(Promise.all([healthy, alsoHealthy]), 'it is healthy')
    for (const { signal } of [late, unused]) {
      assert.equal(getEventListeners(signal, 'abort').length, 0)
    }
    assert.equal((await monitor.health()).reason, 'OK')
    assert.deepEqual((await monitor.status()).probers, [])

    monitor.registerDatabase('main', { isConnected: () => false })
    const untilStopped = monitor.untilHealthy()
    assert.ok(await isPendingFor(50, untilStopped))
    await monitor.stop()
    await inTime(untilStopped, 'nothing is to be waited for')
    await inTime(monitor.untilHealthy(), 'there is nothing to wait for')

    await bootInstance(t, { monitor, server, until: 'started' })
    const untilShutDown = monitor.untilHealthy()
    let isPending = false
    const cleanUp = async () => {
      isPending = await isPendingFor(300, untilShutDown)
    }
    await monitor.shutdown({ cleanUp })
    assert.ok(isPending)
    const message = 'ftw-monitor: the instance has shut down'
    await assert.rejects(inTime(untilShutDown, 'it has ended'), { message })
    await assert.rejects(monitor.untilHealthy(), { message })
  })
})

describeInProcess('The verdict', ALONE, () => {
  test('this machine is told a reason, a stranger its category', NEEDS_OUTSIDE, async (t) => {
    takeTimers(t) // so that nothing is tried again
    let isConnected = (): unknown => true
    const { monitor, port } = await bootInstance(t, {
      databases: { main: { isConnected: () => isConnected() as boolean } },
      performers: { '/shop': () => Promise.reject(new Error('no table')) },
      until: 'started'
    })
    const expectReplies = async (from: string, text: string, word = 'down') => {
      const replies: Record<string, string> = { health_check: text, readyz: text }
      replies['agent_check'] = `${word} #${text}`
      const [, fault] = /^Error: (.*)/.exec(text) ?? []
      if (fault) replies['perf_metrics'] = `{"error":"${fault}"}`
      for (const [line, reply] of Object.entries(replies)) {
        assert.equal(await ask(port, `${line}\n`, { from }), `${reply}\n`)
        assert.equal((await getPage(port, `/${line}`, { from })).body, `${reply}\n`)
      }
    }
    const us = '127.0.0.1'
    const stranger = OUTSIDE!
    await untilVerdict(monitor, /^Warmup failed/)
    await expectReplies(us, 'Warmup failed: /shop: no table')
    await expectReplies(stranger, 'Warmup failed')
    isConnected = () => Promise.reject(new Error('no 10.0.0.7'))
    await expectReplies(us, "Error: Database 'main' failed: no 10.0.0.7")
    await expectReplies(stranger, "Error: Database 'main' failed.")
    isConnected = () => ({})
    const why = 'isConnected() returned a value of type object, not true'
    await expectReplies(us, `Error: Database 'main' disconnected: ${why}`)
    await expectReplies(stranger, "Error: Database 'main' disconnected.")
    void monitor.drain({ reason: 'new disk' })
    for (const from of [us, stranger]) await expectReplies(from, 'new disk', 'stopped')
  })

  test('with PORT alone, the first check after the server has closed is red, until it listens again', async (t) => {
    const timers = takeTimers(t)
    const clock = fakeClock(t)
    const path = join(scratchFolder(t), 'instance')
    const port = await freePort()
    const places: [where: number | string, net.ListenOptions][] = [
      [port, { host: '127.0.0.1', port }],
      [path, { path }]
    ]
    for (const [where, place] of places) {
      setEnvironment(t, { PORT: `${where}`, HOST: '127.0.0.1', FTW_MONITOR_AUTOWARMUP: 'off' })
      const server = hide(await serve(t, hello, place))
      const accept = t.mock.fn()
      server.on('connection', accept)
      const monitor = await importMonitor(t)
      assert.ok(await monitor.start({ logger: recorder(), listen: LOOPBACK }))
      const check = async () => {
        clock.now += 1_001
        return (await monitor.health()).reason
      }
      await until(async () => (await check()) === 'OK', 'it is healthy')

      const seeAll = () => ask(where, headOf('/', 'Connection: close')) // it comes behind all others
      await seeAll()
      accept.mock.resetCalls()
      timers.pass(60_000)
      await seeAll()
      assert.equal(accept.mock.callCount(), 1, 'no check, no connection')
      clock.now += 1_001
      const verdicts = await Promise.all(Array.from({ length: 50 }, () => monitor.health()))
      assert.ok(verdicts.every(({ reason }) => reason === 'OK'))
      await seeAll()
      assert.equal(accept.mock.callCount(), 3, 'all checks share one')
      const countConnections = promisify(server.getConnections.bind(server))
      await until(async () => (await countConnections()) === 0, 'none stays connected', 700)

      await close(server)
      assert.equal(await check(), 'Instance is shutting down')
      const again = hide(await serve(t, hello, place))
      assert.equal(await check(), 'OK')
      await close(again)
      if (where === path) fs.writeFileSync(path, '') // what is left refuses, as that of a killed one
      assert.equal(await check(), 'Instance is shutting down')
    }

    const known = await bootInstance(t, { performers: WARM })
    const accept = t.mock.fn()
    known.server.on('connection', accept)
    clock.now += 1_001
    await known.monitor.health()
    await getPage(known.instancePort, '/')
    assert.equal(accept.mock.callCount(), 1, 'a server that is known is not asked')
  })

  test('with PORT alone, an instance too busy to accept stays what it was', SLOW, async (t) => {
    const port = await freePort()
    setEnvironment(t, { PORT: String(port), HOST: '127.0.0.1', FTW_MONITOR_AUTOWARMUP: '0' })
    const script = `
      const where = { host: '127.0.0.1', port: ${port}, backlog: 1 }
      net.createServer().listen(where, () => print('listens'))`
    const listen = async () => {
      const process = runScript(t, { script })
      await until(() => process.output.includes('listens'), 'it listens')
      return process
    }
    const isWaiting = () => {
      const socket = connectTo(port, {}).on('error', () => {})
      t.after(() => socket.destroy())
      return isPendingFor(1_000, once(socket, 'connect'))
    }
    const fillBacklog = async ({ child }: { child: ChildProcess }) => {
      child.kill('SIGSTOP')
      await until(isWaiting, 'its backlog is full')
    }
    const first = await listen()
    const monitor = await importMonitor(t)
    await monitor.start({ logger: recorder() })
    await untilVerdict(monitor)
    await fillBacklog(first)
    const clock = fakeClock(t)
    clock.now += 1_001
    assert.equal((await monitor.health()).reason, 'OK')

    first.child.kill('SIGKILL')
    await first.exit
    clock.now += 1_001
    assert.equal((await monitor.health()).reason, 'Instance is shutting down')

    await fillBacklog(await listen())
    clock.now += 1_001
    assert.equal((await monitor.health()).reason, 'Instance is shutting down')
  })
})

// --- Databases and counters ----------------------------------------------------------------------

/** What a database may answer instead of true or false. */
const NEITHER = [undefined, null, 0, 1, 'true', {}, [], [true], Symbol(), thrower, { then: true }]

const REFUSED = ['::1', '127.0.0.1'].map((host) => new Error(`connect ECONNREFUSED ${host}:5432`))

/** What a database may do when it is asked, and what the status says of it. */
const ANSWERS: [isConnected: () => unknown, trouble: string][] = [
  [() => true, ''],
  [async () => true, ''],
  [() => false, 'disconnected'],
  [async () => false, 'disconnected'],
  ...NEITHER.map((value): [() => unknown, string] => {
    const kind = value === null ? 'null' : typeof value
    return [() => value, `disconnected: isConnected() returned a value of type ${kind}, not true`]
  }),
  [async () => 1, 'disconnected: isConnected() returned a value of type number, not true'],
  [thrower, 'failed: trap'],
  [() => Promise.reject(new TypeError('bad password')), 'failed: bad password'],
  [() => Promise.reject('only text'), 'failed: only text'],
  [() => Promise.reject(new AggregateError(REFUSED)), 'failed: connect ECONNREFUSED ::1:5432'],
  [() => Promise.reject(new AggregateError(REFUSED, 'no host')), 'failed: no host'],
  [() => Promise.reject(new AggregateError([])), 'failed: AggregateError'],
  [() => trapped(['then']), 'failed: trap'],
  [() => ({ then: (_: unknown, reject: Function) => reject(new Error('no')) }), 'failed: no'],
  [hang, 'timed out'],
  [() => ({ then() {} }), 'timed out']
]

/** What a check may answer to pass. */
const PASSING = [undefined, null, 0, '', true, 'text']

/** What a check may do when it is asked, and what the status says of it. */
const CHECKS: [check: () => unknown, trouble: string][] = [
  ...PASSING.map((value): [() => unknown, string] => [() => value, '']),
  [async () => 0, ''],
  [() => false, 'failed'],
  [async () => false, 'failed'],
  [thrower, 'failed: trap'],
  [() => Promise.reject(new Error('/var/spool is full')), 'failed: /var/spool is full'],
  [hang, 'timed out']
]

/** The lines that tell of a change of the verdict, without the time that it was red. */
function changesLogged({ lines }: { lines: string[] }): string[] {
  const changes = lines.filter((line) => / is (red|healthy)/.test(line))
  return changes.map((line) => line.replace(/\d+\.\d s/, 'N s'))
}

/** An instance that nobody asks, and whose log tells of its boot. */
async function bootUnasked(t: TestContext, setup: InstanceSetup = {}) {
  const instance = await bootInstance(t, { performers: WARM, ...setup, until: 'started' })
  await until(() => changesLogged(instance.logger).length > 0, 'the boot is told')
  return instance
}

const RECORDED_BOOT = ['Instance is booting', 'Warmup in progress', 'OK']

describeInProcess('Changes of the verdict', ALONE, () => {
  test('an instance that nobody asks tells of its boot, a warm-up and a drain, and asks its database only then; a shutdown is told phase by phase, and nothing as healthy any more', async (t) => {
    const timers = takeTimers(t)
    const isConnected = t.mock.fn(() => true)
    const setup = { performers: {}, databases: { main: { isConnected } } } // its page is loaded
    const { monitor, port, logger } = await bootUnasked(t, setup)
    assert.deepEqual(changesLogged(logger), ['info ftw-monitor is healthy after N s'])
    for (let minute = 0; minute < 60; minute++) {
      timers.pass(60_000)
      await nextTurn()
    }
    assert.equal(isConnected.mock.callCount(), 1)
    assert.deepEqual(warningsOf(logger), [], 'the page has been answered')

    await ask(port, 'warmup\n')
    const isWarmupTold = () => {
      timers.pass(1_000) // between two lines
      return changesLogged(logger).length === 3
    }
    await until(isWarmupTold, 'it was red')
    timers.pass(1_000)
    const drained = monitor.drain({ reason: 'Moving house' })
    assert.equal(changesLogged(logger).at(-1), 'info ftw-monitor is red: Moving house')
    await drained
    timers.pass(1_000)
    monitor.resume()
    await until(() => changesLogged(logger).length === 5, 'its end is told')
    assert.equal(changesLogged(logger).at(-1), 'info ftw-monitor is healthy again after N s')
    assert.equal(isConnected.mock.callCount(), 3)
    const reasons = [...RECORDED_BOOT, 'Warmup in progress', 'OK', 'Moving house', 'OK']
    assert.deepEqual(await reasonsOf(monitor), reasons)

    timers.pass(1_000)
    isConnected.mock.mockImplementationOnce(() => false)
    await monitor.health()
    await monitor.health() // OK, which is to be told a second later
    const seen = logger.lines.length
    const ended = monitor.shutdown()
    timers.pass(2_000)
    await ended
    const told = logger.lines.slice(seen).filter((line) => /shut|red|healthy/.test(line))
    const untimed = told.map((line) => line.replace(/\d+\.\d s$/, 'N s'))
    assert.deepEqual(untimed, [
      'info ftw-monitor shuts down',
      'info ftw-monitor is red: Draining',
      'info ftw-monitor shutdown: settling after N s',
      'info ftw-monitor shutdown: closing after N s',
      'info ftw-monitor shutdown: cleaning after N s',
      'info ftw-monitor shutdown: done after N s'
    ])
    assert.equal((await monitor.health()).reason, 'Instance is shutting down')
  })

  test('a server that closes aborts a warm-up within a second though nobody asks; it begins anew when it listens again, and both are recorded', async (t) => {
    const timers = takeTimers(t)
    const { server, held, letGo } = await serveHeld(t)
    const { monitor, logger, port, instancePort } = await bootUnasked(t, { server })
    const lastChange = () => changesLogged(logger).at(-1)
    const signals: AbortSignal[] = []
    monitor.registerWarmup('/shop', ({ signal }) => {
      signals.push(signal)
      return signals.length === 1 ? hang() : undefined
    })
    const answer = getPage(instancePort, '/held')
    await until(() => held.length === 1 && signals.length === 1, 'both run')
    server.close()
    timers.pass(1_000)
    assert.equal(signals[0]?.aborted, true)
    assert.equal(lastChange(), 'info ftw-monitor is red: Instance is shutting down')
    assert.equal(await ask(port, 'health_check\n'), 'Instance is shutting down\n')
    letGo()
    await answer
    await until(() => !server.listening && logger.lines.at(-1)?.includes('closed'), 'it is closed')

    await startListening(t, server, { host: '127.0.0.1', port: instancePort })
    const isHealthyTold = () => {
      timers.pass(1_000)
      return lastChange()?.includes('is healthy again after')
    }
    await until(isHealthyTold, 'it is green again')
    assert.equal(signals.length, 2)
    const reasons = [...RECORDED_BOOT, 'Instance is shutting down', ...RECORDED_BOOT]
    assert.deepEqual(await reasonsOf(monitor), reasons)
  })

  test('each change that a check sees is one line in the log, but at most one a second, with its reason and how long it was red', async (t) => {
    const clock = fakeClock(t)
    const timers = takeTimers(t, ['setInterval'], clock)
    let trouble = ''
    const isConnected = () => trouble === '' || Promise.reject(new Error(trouble))
    const { monitor, logger } = await bootUnasked(t, { databases: { main: { isConnected } } })
    const changeAfter = async (ms: number, to: string) => {
      timers.pass(ms)
      trouble = to
      for (let check = 0; check < 3; check++) await monitor.health()
    }
    await changeAfter(60_000, 'no 10.0.0.7')
    await changeAfter(10_000, 'no 10.0.0.8') // no change of its category
    await changeAfter(14_100, '')
    assert.deepEqual(logger.lines.slice(-3), [
      'info ftw-monitor is healthy after 0.0 s',
      "warn ftw-monitor is red: Database 'main' failed: no 10.0.0.7",
      'info ftw-monitor is healthy again after 24.1 s'
    ])

    timers.pass(10_000)
    const seen = logger.lines.length
    for (let flip = 0; flip <= 100; flip++) await changeAfter(0, flip % 2 === 0 ? 'no host' : '')
    assert.equal(logger.lines.length, seen + 1)
    await changeAfter(10_000, '')
    await changeAfter(0, 'no host')
    await changeAfter(0, '')
    timers.pass(2_000)
    const why = "Database 'main' failed: no host"
    assert.deepEqual(logger.lines.slice(seen), [
      `warn ftw-monitor is red: ${why}`,
      `warn ftw-monitor is red: ${why}`,
      'info ftw-monitor is healthy again after 10.0 s',
      `info ftw-monitor is healthy again after 0.0 s; it was red: ${why}`
    ])
  })

  test('the last ten changes are in status(), JSON, text and page, with their times', async (t) => {
    const { monitor, port } = await bootInstance(t, { performers: WARM })
    for (let count = 0; count < 25; count++) {
      monitor.registerDatabase('main', { isConnected: () => count % 2 === 1 })
      await monitor.health()
    }
    const { changes, grade } = await monitor.status()
    assert.equal(grade, 'fail')
    const greenAndRed = ['OK', "Error: Database 'main' disconnected."]
    assert.deepEqual(await reasonsOf(monitor), Array.from({ length: 5 }, () => greenAndRed).flat())
    for (const { healthy, reason, time } of changes) {
      assert.equal(healthy, reason === 'OK')
      assert.ok(Math.abs(Date.now() - Date.parse(time)) < 60_000, time)
    }

    const latest = `since      ${changes[9]?.time.slice(0, 19).replace('T', ' ')}Z  red: Error: Database`
    const [, ...rows] = (await ask(port, 'status\n')).split(/\n(?=since )/)
    assert.equal(rows.length, 10)
    assert.ok(rows[0]?.startsWith(latest), rows.join())
    const seenAt = Date.now()
    const later = t.mock.method(Date, 'now', () => seenAt + 100_000)
    const ages = (await askHealthJson(port)).json.checks['verdict:age']
    later.mock.restore()
    assert.equal(ages.length, 10)
    for (const { observedValue } of ages) assert.ok(Math.abs(observedValue - 105) < 5)
    const { body } = await openPage(port)
    assert.equal(body.split('<th scope="row">since').length - 1, 10)
    const marks = body.matchAll(/<rect class="\w+" x="([\d.]+)" width="([\d.]+)"/g)
    const spans = Array.from(marks, ([, x, width]) => {
      return { begin: Number(x), end: Number(x) + Number(width) }
    })
    assert.equal(spans.length, 10)
    for (const [index, { end }] of spans.entries()) {
      const next = spans[index + 1]?.begin ?? 120
      assert.ok(Math.abs(end - next) < 0.11, 'each ends where the next begins')
    }
  })

  test('a fault of our own is logged once a minute, and the application serves', async (t) => {
    const setup = { performers: WARM, isFaulty: true }
    const { server, instancePort, logger } = await bootInstance(t, setup)
    const clock = fakeClock(t)
    const countFaultsAfter = (ms: number) => {
      clock.now += ms
      server.emit('request', trapped(['method', 'url', 'socket']), { end() {} })
      return errorsOf(logger).length
    }
    assert.deepEqual([0, 59_999, 1].map(countFaultsAfter), [1, 1, 2])
    assert.match(logger.lines.at(-1) ?? '', /^error ftw-monitor has an internal error: trap\n +at /)
    assert.equal((await getPage(instancePort, '/')).body, 'hello')
  })
})

describeInProcess('Databases, checks and counters', TOGETHER, () => {
  test('status, JSON and page have a row for each check, and one that is optional only warns', async (t) => {
    const { monitor, port } = await bootInstance(t, { performers: WARM })
    monitor.registerCheck('mail', () => false, { optional: true })
    monitor.registerCheck('disk', () => true)
    monitor.registerCheck('queue', () => Promise.reject(new Error('no broker')))
    const text = await ask(port, 'status\n')
    assert.match(text, /^check {6}mail {3,}failed \(optional\)$/m)
    assert.match(text, /^check {6}disk {3,}passes, answered in \d+ ms$/m)
    assert.match(text, /^check {6}queue {3,}failed: no broker$/m)
    const { json } = await askHealthJson(port)
    const rows: Record<string, string>[] = json.checks['check:responseTime']
    const shown = rows.map(({ componentId, status }) => `${componentId} ${status}`)
    assert.deepEqual(shown, ['mail warn', 'disk pass', 'queue fail'])
    assert.equal(rows[2]?.['output'], 'failed: no broker')
    const { body } = await openPage(port)
    assert.match(body, /<tr class="fail"><th scope="row">check<td>queue<td>failed: no broker/)
    const { answeredMs: _, ...last } = (await monitor.status()).checks[2]!
    const known = { name: 'queue', passing: false, trouble: 'failed: no broker' }
    assert.deepEqual(last, { ...known, optional: false, pendingSeconds: -1 })
  })

  test('a service that registers without end is not waited for', async (t) => {
    const { monitor, port } = await bootInstance(t, { performers: WARM })
    let count = 0
    const isConnected = async () => {
      count++
      monitor.registerDatabase(`tenant${count}`, { isConnected })
      await pause(20)
      return true
    }
    monitor.registerDatabase('tenant', { isConnected })
    assert.equal(await ask(port, 'health_check\n'), 'OK\n')
    assert.doesNotMatch(await ask(port, 'metrics\n'), /^ftw_monitor_database_connected.* 0$/m)
    const { databases } = await monitor.status()
    assert.ok(databases.length > 1 && databases.every(({ connected }) => connected))
    assert.ok(count < 100, `${count} were asked`)
  })

  test('a wrong check, site or performer is a TypeError that says so', async (t) => {
    const { registerCheck, registerWarmup } = await importMonitor(t)
    const nothing = () => {}
    const rows: [register: Function, args: unknown[], message: RegExp][] = [
      [registerCheck, [], /a check has a name/],
      [registerCheck, ['two words', nothing], /a check has a name without white space/],
      [registerCheck, ['disk', { check: nothing }], /a check is a function/],
      [registerCheck, ['disk', nothing, null], /a check takes an object with any of optional/],
      [registerCheck, ['disk', nothing, { optional: 1 }], /optional is true or false/],
      [registerWarmup, ['/'], /a warm-up performer is a function/]
    ]
    for (const site of ['', 'shop', '/a b', undefined, 42]) {
      rows.push([registerWarmup, [site, nothing], /a site is/])
    }
    for (const [register, args, message] of rows) {
      assert.throws(() => register(...args), { name: 'TypeError', message })
    }
  })

  test('figures and connections of wrong types are -1 or one line, and the host lives', async (t) => {
    const { monitor, port } = await bootInstance(t, { performers: WARM })
    const values = [null, 7, 'text', [], {}, undefined, true, Symbol('x'), thrower]
    const wrong: unknown[] = [
      ...values,
      { size: '12', nonGhost: NaN, accesses: Infinity, objects: {}, bytes: Symbol('x') },
      { maxSize: null, recordsAdded: [7], bytesAdded: thrower, conflicts: new Date(7) },
      [
        ...values,
        { openedAt: 'yesterday', info: 'x' },
        { openedAt: NaN, info: { toString: thrower } }
      ]
    ]
    const failing: unknown[] = [
      new Proxy({}, TRAPS),
      [new Proxy({}, TRAPS)],
      trapped(['size', 'nonGhost', 'accesses', 'recordsAdded', 'objects', 'maxSize']),
      [{ openedAt: Symbol('x'), info: '' }]
    ]
    const shapes = {
      dbinfo: /^0 0 0 -1 -1\n$/,
      zeocache: /^-1 -1 -1 -1 -1\n$/,
      'monitor 0 main': /^(-1|\d+)\nVmRSS:\t *\d+ kB\n(-?\d+\.\d \P{Cc}*\n)*$/u,
      perf_metrics: /^\{"instance":[^\n]+\}\n$/
    }
    for (const value of [...wrong, ...failing]) {
      const answer = () => value as never
      const database = { isConnected: () => true, figures: answer, connections: answer }
      monitor.registerDatabase('main', database)
      for (const [line, shape] of Object.entries(shapes)) {
        const reply = await ask(port, `${line}\n`)
        const isFailure = failing.includes(value) && !shape.test(reply)
        assert.match(reply, isFailure ? /^\P{Cc}+\n$/u : shape)
      }
    }
    assert.equal(await ask(port, 'health_check\n'), 'OK\n')
  })
})

describeInProcess('Databases, checks and counters', ALONE, () => {
  test('FTW_MONITOR_CHECK names pages of the service, perhaps with a query, that must answer below 400', async (t) => {
    const pages = '/health?deep=1#top, /café?für=1 /own /ready /ready?deep=1'
    setEnvironment(t, { FTW_MONITOR_CHECK: pages })
    let code = 302
    const seen = new Set<string>()
    const { monitor, instancePort, logger } = await bootInstance(t, {
      ...READY,
      prepare: (copy) => copy.registerCheck('/own', () => true),
      handler: ({ url = '' }, response) => {
        seen.add(url)
        if (code > 0) response.writeHead(code).end()
      }
    })
    const names = (await monitor.status()).checks.map(({ name }) => name)
    assert.deepEqual(names, ['/own', '/health?deep=1', '/café?für=1'])
    assert.deepEqual([...seen].sort(), ['/caf%C3%A9?f%C3%BCr=1', '/health?deep=1'])
    const warnings = warningsOf(logger)
    assert.equal(warnings.length, 2)
    assert.match(warnings.join(), /leaves \/ready out of .*leaves \/ready\?deep=1 out of /)

    for (const bad of [400, 404, 503]) {
      code = bad
      const { reason } = await monitor.health()
      assert.equal(reason, `Error: Check '/health?deep=1' failed: it answered ${bad}`)
      const { status, body } = await getPage(instancePort, '/ready')
      assert.deepEqual([status, body], [503, "Error: Check '/health?deep=1' failed.\n"])
    }
    code = 0
    assert.equal((await monitor.health()).reason, "Error: Check '/health?deep=1' timed out.")
    code = 200
    await untilVerdict(monitor)
    const verdict = monitor.health()
    Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 2_000)
    assert.equal((await verdict).reason, 'OK', 'none is late where the application has blocked')
  })

  test('what FTW_MONITOR_CHECK names and is no page is a check that fails, unless code has one of its name, and so is a page where HTTP/2 alone is spoken', async (t) => {
    setEnvironment(t, { FTW_MONITOR_CHECK: '/health shop basket' })
    const { monitor } = await bootInstance(t, {
      performers: WARM,
      prepare: ({ registerCheck }) => registerCheck('shop', () => true),
      server: await startListening(t, http2.createServer()),
      until: 'started'
    })
    await untilVerdict(monitor, /^Error: Check '\/health' failed: .*; it speaks no HTTP\/1$/)
    monitor.registerCheck('/health', () => true)
    await untilVerdict(monitor, /^Error: Check 'basket' failed: cannot be used: /)
  })

  test('a page that is late while it is warmed up is no fault, nor just after that; one that fails is', async (t) => {
    setEnvironment(t, { FTW_MONITOR_CHECK: '/' })
    const { opened, open } = latch()
    let code = 0 // for none
    const { monitor, port } = await bootInstance(t, {
      performers: { '/': () => opened },
      handler: (_, response) => {
        if (code > 0) response.writeHead(code).end()
      },
      until: 'started'
    })
    const untilState = (state: string) =>
      until(async () => (await ask(port, 'warmup_state\n')) === state, state)
    await untilState('0 1\n')
    assert.equal((await monitor.health()).reason, 'Warmup in progress')
    assert.equal((await monitor.status()).grade, 'warn')
    code = 500
    await untilVerdict(monitor, "Error: Check '/' failed: it answered 500")
    code = 200
    await untilVerdict(monitor, 'Warmup in progress')
    code = 0
    const cold = monitor.health()
    open()
    await untilState('1 0\n')
    assert.equal((await cold).reason, 'Warmup in progress')
    code = 200
    await untilVerdict(monitor)
  })

  test('a page is not asked for while the instance boots, nor does it pass because of that', async (t) => {
    setEnvironment(t, { FTW_MONITOR_CHECK: '/health', FTW_MONITOR_AUTOWARMUP: 'off' })
    const monitor = await importMonitor(t)
    const logger = recorder()
    let code = 500
    const server = http.createServer((_, response) => response.writeHead(code).end())
    void monitor.start({ server, listen: LOOPBACK, logger })
    assert.equal((await monitor.health()).reason, 'Instance is booting')
    assert.deepEqual(logger.lines, [])

    const { opened, open } = latch()
    monitor.registerDatabase('main', { isConnected: () => opened.then(() => true) })
    const verdict = monitor.health() // before the page can be asked for
    await startListening(t, server)
    await nextTurn()
    open()
    assert.equal((await verdict).healthy, false)
    code = 200
    await untilVerdict(monitor)
  })

  test('windows of 1, 10, 300 and 3600 s are exact to the second, and no number below 0, or none, is counted', async (t) => {
    const clock = fakeClock(t)
    const random = seeded(3)
    const { monitor, port } = await bootInstance(t, { until: 'started' })
    const activity = monitor.registerDatabase('main', { isConnected: () => true })
    for (const wrong of [-1, NaN, Infinity]) assert.throws(() => activity.loads(wrong), RangeError)
    const history: { at: number; loads: number }[] = []
    const pauses = [0, 1, 1, 2, 8, 9, 10, 11, 289, 290, 299, 300, 301, 3299, 3599, 3600, 3601, 9999]
    for (let round = 0; round < 60; round++) {
      const loads = Math.floor(random() * 1_000)
      activity.loads(loads)
      history.push({ at: clock.now, loads })
      clock.now += 1_000 * pauses[Math.floor(random() ** 2 * pauses.length)]!
      for (const seconds of [1, 10, 300, 3600]) {
        const counted = history.filter(({ at }) => clock.now - at < seconds * 1_000)
        const sum = counted.reduce((all, each) => all + each.loads, 0)
        assert.equal(await ask(port, `dbinfo - ${seconds}\n`), `${sum} 0 0 -1 -1\n`)
      }
    }
  })

  test('1,000,000 events a second are counted exactly, in memory that does not grow', async (t) => {
    const { port } = await bootProcess(t, {
      flags: MEASURED.flags,
      script: `
        ${MEASURED.script}
        const activity = monitor.registerDatabase('main', { isConnected: () => true })
        let now = performance.now()
        performance.now = () => now
        const countForASecond = () => {
          for (let each = 0; each < 1_000_000; each++) activity.loads()
          now += 1_000
        }
        monitor.register('count', '', (peer) => {
          countForASecond()
          const before = measure()
          const cpuBefore = process.cpuUsage()
          countForASecond()
          const { user, system } = process.cpuUsage(cpuBefore)
          peer.write((measure() - before) + ' ' + (user + system) / 1_000_000)
        })`
    })
    const [grown, microseconds] = (await ask(port, 'count\n')).split(' ').map(Number)
    assert.equal(await ask(port, 'dbinfo main 3600\n'), '2000000 0 0 -1 -1\n')
    assert.ok(grown! < 100_000, `${grown} bytes more`)
    assert.ok(microseconds! < 1, `${microseconds} µs for each event`)
  })

  test('all databases and checks are asked at once, and what hangs, throws or lies is told within a second', async (t) => {
    const timers = takeTimers(t, ['setTimeout'])
    const { monitor, port } = await bootInstance(t, { performers: WARM })
    let asked = 0
    const counted = (answer: () => unknown) => () => {
      asked++
      return answer() as boolean
    }
    for (const [index, [check]] of CHECKS.entries()) {
      monitor.registerCheck(`check${index}`, counted(check))
    }
    for (const [index, [answer]] of ANSWERS.entries()) {
      monitor.registerDatabase(`db${index}`, { isConnected: counted(answer) })
    }

    const timersBefore = timers.count()
    const known = monitor.status()
    await nextTurn()
    await nextTurn()
    assert.equal(asked, ANSWERS.length + CHECKS.length)
    const hanging = [...ANSWERS, ...CHECKS].filter(([, trouble]) => trouble === 'timed out')
    assert.equal(timers.count(), timersBefore + hanging.length, 'what has answered leaves none')
    timers.pass(1_000)
    const { databases, checks, reason } = await known
    assert.equal(timers.count(), timersBefore)
    assert.equal(reason, "Error: Database 'db2' disconnected.")
    assert.equal((await monitor.health()).reason, reason)
    const told = [...databases, ...checks].map(({ trouble }) => trouble)
    const expected = [...ANSWERS, ...CHECKS].map(([, trouble]) => trouble)
    assert.deepEqual(told, expected)

    const metrics = await ask(port, 'metrics\n')
    for (const { name, trouble, connected } of databases) {
      assert.equal(await ask(port, `zeostatus ${name}\n`), trouble === '' ? 'True\n' : 'False\n')
      assert.match(metrics, new RegExp(`connected{database="${name}"} ${connected ? 1 : 0}\n`))
      const figures = await ask(port, `perf_metrics ${name}\n`)
      assert.equal(figures.startsWith(`{"error":"Database '${name}' `), !connected, figures)
    }

    monitor.registerDatabase('mute', { isConnected: () => true, figures: hang, connections: hang })
    const commands = ['dbinfo mute', 'zeocache mute', 'perf_metrics mute', 'monitor 0 mute']
    const replies = commands.map((line) => ask(port, `${line}\n`))
    await untilSeen(port)
    timers.pass(1_000)
    for (const reply of await Promise.all(replies)) assert.match(reply, /^[^\n]+\n$/)
  })

  test('a database that is registered or replaced while a check waits is asked before anybody judges it', async (t) => {
    takeTimers(t, ['setTimeout']) // so that no answer is late
    const main: Database = { isConnected: () => true }
    const { monitor, port } = await bootInstance(t, { performers: WARM, databases: { main } })
    for (const name of ['tenant7', 'tenant7', 'tenant8']) {
      const isConnected = name === 'tenant7'
      const gate = latch()
      main.isConnected = () => gate.opened.then(() => true)
      const lines = ['health_check\n', 'agent_check\n', 'metrics\n']
      const replies = Promise.all(lines.map((line) => ask(port, line)))
      const known = Promise.all([monitor.health(), monitor.status()])
      await untilSeen(port)
      monitor.registerDatabase(name, { isConnected: () => isConnected })
      gate.open()

      const [check, agent = '', metrics = ''] = await replies
      const [{ reason }, { databases }] = await known
      const verdict = isConnected ? 'OK' : `Error: Database '${name}' disconnected.`
      assert.deepEqual([check, reason], [`${verdict}\n`, verdict])
      assert.match(agent, isConnected ? /^up / : /^down /)
      assert.match(metrics, new RegExp(`^ftw_monitor_healthy ${Number(isConnected)}$`, 'm'))
      assert.equal(/^ftw_monitor_database_connected.* 0$/m.test(metrics), !isConnected)
      assert.equal(databases.at(-1)?.connected, isConnected)
    }
  })

  test('a question that is never answered is asked anew after 30 s, and an answer counts for all who ask, as does a late one', async (t) => {
    const timers = takeTimers(t, ['setTimeout'])
    const clock = fakeClock(t)
    await serve(t) // the limits of questions keep no process alive
    const monitor = await importMonitor(t)
    const questions: ((answer: boolean) => void)[] = []
    const isConnected = () => new Promise<boolean>((resolve) => void questions.push(resolve))
    monitor.registerDatabase('main', { isConnected })
    const check = async () => (await inTime(monitor.health(), 'there is a verdict')).reason
    const expectTimeoutAndPass = async (ms: number) => {
      const reason = check()
      timers.pass(1_000)
      assert.equal(await reason, "Error: Database 'main' timed out.")
      clock.now += ms
    }
    const pendingSeconds = async () => {
      const known = monitor.status()
      timers.pass(1_000)
      return (await known).databases[0]?.pendingSeconds
    }

    assert.equal(await pendingSeconds(), 0)
    for (let time = 0; time < 30; time++) await expectTimeoutAndPass(999)
    clock.now += 29
    assert.equal(await pendingSeconds(), 29.999)
    assert.equal(questions.length, 1)
    clock.now += 1
    assert.equal(await pendingSeconds(), 30)
    assert.equal(questions.length, 2)
    await expectTimeoutAndPass(3_000)
    assert.equal(await pendingSeconds(), 33)
    questions[1]?.(true) // the connection that was cut is out for ever
    assert.equal(await pendingSeconds(), -1)

    await expectTimeoutAndPass(30_000)
    const both = [check(), check()]
    assert.equal(questions.length, 4)
    questions[3]?.(true)
    assert.deepEqual(await Promise.all(both), ['Instance is booting', 'Instance is booting'])

    await expectTimeoutAndPass(30_000)
    const another = check()
    assert.equal(questions.length, 6)
    questions[4]?.(false)
    assert.equal(await another, "Error: Database 'main' disconnected.")
  })
})

// --- Warm-up -------------------------------------------------------------------------------------

currentPart = 'warm-up'

describeInProcess('Warm-up', TOGETHER, () => {
  test('/@@warmup and the command warmup warm every site, or one; others are not found, and a POST does nothing', async (t) => {
    const { calls, failures, performers } = recordSites('/', '/shop/hats', '/k%C3%A4se')
    const { port, instancePort } = await bootInstance(t, { performers })
    const askFor = async (what: string) => {
      calls.length = 0
      const isLine = what.startsWith('warmup')
      const reply = isLine ? await ask(port, `${what}\n`) : (await getPage(instancePort, what)).body
      return `${reply.trimEnd()}: ${calls.join(' ')}`
    }
    const all = ['/@@warmup', '/@@warmup?now=1', 'http://a:8080/@@warmup', 'warmup', 'warmup /']
    const hats = ['/shop/hats/@@warmup', 'HTTP://a/shop/hats/@@warmup?now=1', 'warmup /shop/hats/']
    const waysToWarm: Record<string, string[]> = {
      '/ /shop/hats /k%C3%A4se': all,
      '/shop/hats': hats,
      '/k%C3%A4se': ['warmup /käse']
    }
    for (const [warmed, ways] of Object.entries(waysToWarm)) {
      for (const way of ways) assert.equal(await askFor(way), `Warmup successful: ${warmed}`, way)
    }
    const { status, headers } = await getPage(instancePort, '/@@warmup')
    assert.deepEqual([status, headers['content-type']], [200, 'text/plain; charset=utf-8'])

    for (const site of ['/nowhere', 'shop', '//', '/a?b', 'constructor']) {
      assert.equal(await askFor(`warmup ${site}`), `Error: no site '${site}' is registered: `)
    }
    for (const path of ['/nowhere/@@warmup', '/shop/@@warmup']) {
      assert.equal((await getPage(instancePort, path)).status, 404, path)
    }
    const queries = ['/?next=/@@warmup', '/?next=a?/@@warmup', 'http://localhost?/@@warmup']
    for (const path of ['/shop/hats', ...queries, 'http://localhost/?next=/@@warmup']) {
      assert.equal(await askFor(path), 'hello: ', path)
    }
    assert.equal((await getPage(instancePort, '/@@warmup', { method: 'POST' })).status, 405)
    await assertReplies(port, { 'PROXY UNKNOWN\r\nwarmup\n': 'warmup is for this machine only\n' })
    assert.deepEqual(calls, [])
    assert.equal(await ask(port, 'health_check\n'), 'OK\n')
    failures['/shop/hats'] = new Error('no hat is OK')
    const failed = 'Warmup failed: /shop/hats: no hat is O K'
    assert.equal(await askFor('warmup /shop/hats'), `${failed}: /shop/hats`)
    assert.equal(await ask(port, 'health_check\n'), `${failed}\n`)
  })

  test('each site is warmed once for all who ask meanwhile, or hang up, and what is new is queued; who asks for one site during a warm-up of all hears of that alone, and has it warmed again if it is past', async (t) => {
    const sites = recordSites('/', '/shop')
    let slow = latch()
    slow.open()
    const performers = { ...sites.performers, '/slow': () => slow.opened }
    const { port, instancePort } = await bootInstance(t, { performers })
    const askFor = async (what: string) => {
      if (what.startsWith('warmup')) return await ask(port, `${what}\n`)
      return (await getPage(instancePort, what)).body
    }
    const rows: [first: string, others: string[], calls: string[]][] = [
      ['/@@warmup', ['/@@warmup', '/shop/@@warmup'], ['/', '/shop']],
      ['/shop/@@warmup', ['/@@warmup', '/@@warmup'], ['/shop', '/']],
      ['warmup', ['/@@warmup', 'warmup /shop'], ['/', '/shop']]
    ]
    for (const [first, others, calls] of rows) {
      sites.calls.length = 0
      sites.gate = latch()
      const caller = await converse(t, instancePort)
      caller.say(headOf(first === 'warmup' ? '/@@warmup' : first))
      await until(() => sites.calls.length > 0, 'the first one is running')
      caller.socket.resetAndDestroy()
      const answers = [first, ...others].map(askFor)
      await getPage(instancePort, '/') // by then the others are seen
      await untilSeen(port)
      assert.equal(await ask(port, 'health_check\n'), 'Warmup in progress\n')
      assert.equal(await ask(port, 'warmup_state\n'), '0 1\n')
      assert.equal(sites.calls.length, 1)
      sites.gate.open()
      for (const answer of answers) assert.equal(await answer, 'Warmup successful\n')
      assert.deepEqual(sites.calls, calls)
      assert.equal(await ask(port, 'health_check\n'), 'OK\n')
    }

    slow = latch()
    sites.gate = latch()
    sites.failures = { '/': new Error('root is broken') }
    sites.calls.length = 0
    const all = getPage(instancePort, '/@@warmup')
    await until(() => sites.calls.length === 1, 'the first site is running')
    const one = ask(port, 'warmup /shop\n')
    await untilSeen(port)

    sites.gate.open()
    assert.equal(await inTime(one, 'the command replies', 5_000), 'Warmup successful\n')
    assert.ok(await isPendingFor(50, all))

    const again = getPage(instancePort, '/shop/@@warmup')
    await getPage(instancePort, '/') // by then the view has seen the other request
    slow.open()
    assert.equal((await all).body, 'Warmup failed: root is broken\n')
    assert.equal((await again).body, 'Warmup successful\n')
    assert.deepEqual(sites.calls.slice(0, 3), ['/', '/shop', '/shop']) // before '/' is tried again
  })

  test('credentials in url are sent by the warm-up, and shown to nobody', async (t) => {
    const login = `Basic ${Buffer.from('ad:min:hunter2@ü').toString('base64')}`
    const seen: string[] = []
    const handler: http.RequestListener = ({ url, headers }, response) => {
      seen.push(`${url} ${headers.authorization}`)
      response.writeHead(headers.authorization === login ? 200 : 401).end('a page')
    }
    const server = hide(await serve(t, handler))
    const url = `http://ad%3Amin:hunter2%40%C3%BC@127.0.0.1:${portOf(server)}/base/`
    const options = { server: [], port: portOf(server), url }
    const { monitor, port, logger } = await bootInstance(t, { server, options })
    assert.deepEqual(seen, [`/base/@@warmup ${login}`, `/base ${login}`])
    assert.deepEqual(warningsOf(logger), [])

    const performed: string[] = []
    monitor.registerWarmup('/shop', (site) => void performed.push(site.url))
    await until(() => performed.length > 0, 'the performer has run')
    const plainUrl = `http://127.0.0.1:${portOf(server)}/base`
    const status = await monitor.status()
    assert.deepEqual([performed, status.url], [[`${plainUrl}/shop`], plainUrl])
    const texts = [JSON.stringify(status), ...logger.lines, (await openPage(port)).body]
    for (const name of ['status', 'metrics', 'perf_metrics']) {
      texts.push(await ask(port, `${name}\n`), (await getPage(port, `/${name}`)).body)
    }
    for (const text of texts) assert.doesNotMatch(text, /hunter2|min:|ad:|ad%3A/)
  })

  test('only who is on this machine and names it may ask for a warm-up, and nobody through a proxy or a page', async (t) => {
    const { calls, performers } = recordSites('/')
    const server = await serve(t, hello, { host: '::', port: 0 })
    const port = portOf(server)
    await bootInstance(t, { performers, server, options: { url: `http://Shop.example:${port}` } })
    const rows: [PageOptions, number][] = [
      [{}, 200],
      [{ host: '::1' }, 200],
      [{ host: '127.0.0.1', from: '127.0.0.2' }, 200],
      [{ headers: { 'User-Agent': 'curl/8.5.0' } }, 200],
      [{ headers: { Host: `shop.example:${port}` } }, 200]
    ]
    const namesOfHosts = {
      localhost: 200,
      'LocalHost:8080': 200,
      '127.0.0.1': 200,
      '10.1.2.3:80': 200,
      '[::1]': 200,
      '[::ffff:127.0.0.1]:8080': 200,
      '[FE80::1]:8080': 200,
      'SHOP.example:1': 200,
      'evil.example': 403,
      'evil.example:8080': 403,
      'shop.example.evil.example': 403,
      'localhost.evil.example': 403,
      notlocalhost: 403,
      '127.0.0.1.nip.io:8080': 403,
      '[evil.example]': 403,
      'evil.example:localhost': 403,
      'evil.example@localhost': 403,
      'localhost/evil.example': 403
    }
    for (const [name, status] of Object.entries(namesOfHosts)) {
      rows.push([{ headers: { Host: name } }, status])
    }
    if (OUTSIDE) {
      rows.push([{ host: OUTSIDE, from: OUTSIDE }, 200])
      rows.push([{ host: '127.0.0.1', from: OUTSIDE }, 403])
    }
    const ofProxiesAndPages: Record<string, string[]> = {
      Forwarded: ['for=192.0.2.7'],
      'X-Forwarded-For': ['127.0.0.1', ''],
      'x-forwarded-whatever': ['x'],
      'X-Real-IP': ['127.0.0.1'],
      Via: ['1.1 proxy'],
      'X-Ftw-Monitor-Token': ['of another instance'],
      Origin: ['null', `http://127.0.0.1:${port}`],
      'Sec-Fetch-Site': ['cross-site', 'same-origin', 'none'],
      'User-Agent': ['Mozilla/5.0 (X11; Linux x86_64)']
    }
    for (const [name, values] of Object.entries(ofProxiesAndPages)) {
      for (const value of values) rows.push([{ headers: { [name]: value } }, 403])
    }
    for (const [options, status] of rows) {
      calls.length = 0
      const page = await getPage(port, '/@@warmup', options)
      const isTold = page.body === 'Only this machine may ask for a warm-up\n'
      const expected = status === 200 ? [200, 1, false] : [403, 0, true]
      assert.deepEqual([page.status, calls.length, isTold], expected, JSON.stringify(options))
    }
  })

  test('on an https port that fetch refuses, a performer warms up', needs('openssl'), async (t) => {
    const refused = [10_080, 6_697, 6_669, 6_668, 6_667, 6_666, 6_665, 6_000, 5_060]
    const isFreeOf = await Promise.all(refused.map(isFree))
    const port = refused.find((_, index) => isFreeOf[index])
    if (!port) return t.skip('all such ports are in use')
    const listener = https.createServer(certify(t, 'localhost'), hello)
    const server = await startListening(t, listener, { host: '127.0.0.1', port })
    const { monitor } = await bootInstance(t, { server, until: 'started' })
    const advice = 'bad port for fetch; register a warm-up performer that does without it'
    await untilVerdict(monitor, `Warmup failed: ${advice}`)
    monitor.registerWarmup('/', () => {})
    await untilVerdict(monitor)
  })

  test('an instance that speaks HTTP/2 alone is green when it accepts, after one warning; its :authority counts', async (t) => {
    const instance = http2.createServer(() => assert.fail('no request of ours can be read'))
    const server = await startListening(t, instance)
    const { monitor, port, logger } = await bootInstance(t, { server })
    const warning = 'cannot load /: the instance speaks no HTTP/1; a performer of yours could'
    assert.deepEqual(warningsOf(logger), [`warn ftw-monitor ${warning}`])
    const rows = { localhost: 200, 'localhost:8080': 200, '[::1]:8080': 200, 'evil.example': 403 }
    for (const [authority, status] of Object.entries(rows)) {
      const session = await connectSession(t, portOf(server))
      const stream = session!.request({ ':path': '/@@warmup', ':authority': authority }).resume()
      const [headers] = await inTime(once(stream, 'response'), 'it answers')
      assert.equal(headers[':status'], status, authority)
    }
    monitor.registerWarmup('/', () => Promise.reject(new Error('no stock')))
    assert.equal(await ask(port, 'warmup\n'), 'Warmup failed: no stock\n')
  })

  test('a peer without an address is a stranger, and may not ask for a warm-up', async (t) => {
    const path = join(scratchFolder(t), 'instance')
    await bootInstance(t, { performers: WARM, server: await serve(t, hello, { path }) })
    assert.equal((await getPage(0, '/@@warmup', { socketPath: path })).status, 403)
  })

  test('the default performer loads the root page, and judges it by its status', async (t) => {
    const elsewhere: string[] = []
    const page = (status: number, headers = {}): http.RequestListener => {
      return ({ url }, response) => {
        if (url !== '/') elsewhere.push(url ?? '')
        response.writeHead(status, headers).end('a page')
      }
    }
    const stopHalfway: http.RequestListener = (_, response) => {
      response.writeHead(200, { 'Content-Length': 1_000 }).write('half')
      setTimeout(() => response.destroy(), 20)
    }
    const rows: [http.RequestListener, verdict: RegExp, warning: RegExp][] = [
      [page(200), /^OK$/, /^$/],
      [page(302, { Location: '/elsewhere' }), /^OK$/, /^warn .*302.*nothing behind/],
      [page(404), /^OK$/, /^warn .*404.*nothing behind/],
      [page(500), /^Warmup failed: .*500/, /500/],
      [({ socket }) => void socket.destroy(), /^Warmup failed: ./, /failed/],
      [stopHalfway, /^Warmup failed: ./, /failed/]
    ]
    const judge = async ([handler, verdict, warning]: (typeof rows)[number]) => {
      const { monitor, logger } = await bootInstance(t, { handler, until: 'started' })
      await untilVerdict(monitor, verdict)
      assert.match(warningsOf(logger).join('\n'), warning)
    }
    await Promise.all(rows.map(judge))
    assert.deepEqual(elsewhere, [])
  })

  test('an instance of IPv6 alone is reached, though another process has the port at 127.0.0.1', async (t) => {
    const server = await serve(t, hello, { host: '::', port: 0, ipv6Only: true })
    const another: http.RequestListener = (_, response) => void response.end('of another process')
    await serve(t, another, { host: '127.0.0.1', port: portOf(server) })
    const pages: string[] = []
    const load: WarmupPerformer = async ({ url }) => {
      pages.push(await (await fetch(`${url}/page`)).text())
    }
    const { monitor } = await bootInstance(t, { server, performers: { '/': load } })
    assert.deepEqual(pages, ['hello'])
    assert.equal((await monitor.status()).url, `http://[::1]:${portOf(server)}`)
  })

  test('of sites that fail with long texts no line in the log is long', async (t) => {
    const fail = () => Promise.reject(new Error('no table '.repeat(200)))
    const performers = { '/1': fail, '/2': fail, '/3': fail, '/4': fail, '/5': fail }
    const { logger } = await bootInstance(t, { performers, until: 'started' })
    await until(() => logger.lines.some((line) => line.includes('tries again')), 'all failed')
    for (const line of logger.lines) {
      const limit = line.includes('tries again') ? 2_100 : 600 // it tells of all
      assert.ok(line.length < limit, `${line.length} characters: ${line}`)
    }
  })

  test('a site that is registered during the warm-up delays OK; later it is warmed in the background, in a shutdown never', async (t) => {
    const sites = recordSites('/during', '/late', '/later', '/too-late')
    const register = ({ registerWarmup }: Monitor, site: string) => {
      registerWarmup(site, sites.performers[site]!)
    }
    const { monitor, port } = await bootInstance(t, {
      prepare: (copy) => copy.registerWarmup('/', () => register(copy, '/during'))
    })
    assert.deepEqual(sites.calls, ['/during'])
    const stageOf = async (name: string) =>
      (await monitor.status()).warmup.find(({ site }) => site === name)?.status
    const beginInBackground = async (site: string) => {
      sites.gate = latch()
      register(monitor, site)
      await until(async () => (await stageOf(site)) === 'running', 'it is being warmed')
      assert.equal(await ask(port, 'health_check\n'), 'OK\n')
      assert.equal(await ask(port, 'warmup_state\n'), '1 0\n')
    }

    sites.failures = { '/late': new Error('no stock') }
    await beginInBackground('/late')
    sites.gate.open()
    await untilVerdict(monitor, 'Warmup failed: /late: no stock')
    sites.failures = {}
    await untilVerdict(monitor)
    assert.equal(await stageOf('/late'), 'warm')

    await beginInBackground('/later')
    const one = ask(port, 'warmup /later\n')
    const all = ask(port, 'warmup\n')
    await untilVerdict(monitor, 'Warmup in progress')
    assert.equal(await stageOf('/later'), 'running')
    sites.gate.open()
    assert.deepEqual(await Promise.all([one, all]), Array(2).fill('Warmup successful\n'))
    assert.equal(await ask(port, 'health_check\n'), 'OK\n')

    const ended = monitor.shutdown()
    register(monitor, '/too-late')
    await ended
    assert.ok(!sites.calls.includes('/too-late'))
  })
})

describeInProcess('Warm-up', ALONE, () => {
  test("a dispatcher of the program's own sees nothing of our requests, even with NO_PROXY", async (t) => {
    await fetch('data:,loaded') // by now there is a dispatcher
    const seen: string[] = []
    for (const version of [1, 2]) {
      // as setGlobalDispatcher(new ProxyAgent(…)) does
      const key = Symbol.for(`undici.globalDispatcher.${version}`)
      const inner = Reflect.get(globalThis, key)
      if (!inner) continue
      class ProxyAgent {
        dispatch(options: http.RequestOptions, handler: unknown) {
          seen.push(`${options.path} ${JSON.stringify(options.headers)}`)
          return inner.dispatch(options, handler)
        }
      }
      Reflect.set(globalThis, key, new ProxyAgent())
      t.after(() => Reflect.set(globalThis, key, inner))
    }
    const server = await serve(t)
    const place = `127.0.0.1:${portOf(server)}`
    await fetch(`http://${place}/of-the-program`)
    assert.match(seen.join('\n'), /of-the-program/)
    seen.length = 0

    setEnvironment(t, { NO_PROXY: 'localhost' })
    for (const scheme of ['http', 'https']) {
      const options = { url: `${scheme}://me:secret@${place}` }
      const { monitor } = await bootInstance(t, { server, options, until: 'started' })
      await untilVerdict(monitor, /^(OK|Warmup failed)/)
      const ours = new RegExp(`x-ftw-monitor-token|${btoa('me:secret')}`, 'i')
      assert.doesNotMatch(seen.join('\n'), ours)
    }
  })

  test('FTW_MONITOR_AUTOWARMUP switches automatic warm-up off, wrong pages included; another word costs a warning', async (t) => {
    const boot = async (value: string, pages = '') => {
      setEnvironment(t, { FTW_MONITOR_AUTOWARMUP: value, FTW_MONITOR_WARMUP: pages })
      const { calls, performers } = recordSites('/')
      const { port, logger } = await bootInstance(t, { performers })
      const state = await ask(port, 'warmup_state\n')
      return [...calls, state, ...warningsOf(logger)]
    }
    const page = 'cannot use shop of FTW_MONITOR_WARMUP: a page is a path like /shop or /search?q=a'
    assert.deepEqual(await boot('off', 'shop'), ['0 0\n', `warn ftw-monitor ${page}`])
    const warning = 'cannot use FTW_MONITOR_AUTOWARMUP=none: it is 0, false, no or off'
    assert.deepEqual(await boot('none'), ['/', '1 0\n', `warn ftw-monitor ${warning}`])
  })

  test('without an automatic warm-up a site is off until somebody asks; one that fails is a 500, and red until it is warm', async (t) => {
    const timers = takeTimers(t)
    setEnvironment(t, { FTW_MONITOR_AUTOWARMUP: '0' })
    const sites = recordSites('/first', '/broken', '/odd', '/last')
    sites.failures = { '/broken': new Error('no such template'), '/odd': 'no error at all' }
    const { performers } = sites
    const { monitor, port, instancePort, logger } = await bootInstance(t, { performers })
    const stages = async () => (await monitor.status()).warmup.map(({ status }) => status).join(' ')
    assert.equal((await getPage(instancePort, '/first/@@warmup')).status, 200)
    assert.equal(await stages(), 'warm off off off')
    assert.match(logger.lines.at(-1)!, /^info ftw-monitor \(1\/4\) \/first is warm after \d\.\d s$/)
    sites.gate = latch()
    sites.calls.length = 0
    const page = getPage(instancePort, '/@@warmup')
    await untilVerdict(monitor, 'Warmup in progress')
    sites.gate.open()
    const failed = 'Warmup failed: /broken: no such template; /odd: no error at all\n'
    const { status, body } = await page
    assert.deepEqual([status, body], [500, failed])
    assert.deepEqual(sites.calls, ['/first', '/broken', '/odd', '/last'])
    assert.equal(await stages(), 'warm failed failed warm')
    assert.equal(await ask(port, 'warmup_state\n'), '0 0\n')
    assert.equal(await ask(port, 'health_check\n'), failed)
    sites.failures = { '/odd': 'no error at all' }
    assert.equal((await getPage(instancePort, '/broken/@@warmup')).status, 200)
    assert.equal(await ask(port, 'health_check\n'), 'Warmup failed: /odd: no error at all\n')
    sites.failures = {}
    timers.pass(1_000)
    await untilVerdict(monitor) // tried again like any other
    assert.equal(await ask(port, 'warmup_state\n'), '1 0\n')
  })

  test('FTW_MONITOR_WARMUP names pages that are loaded in their order, after what code registers; what is none fails', async (t) => {
    const plain = ' /shop/  /,/a;b, /hats; /search/?next=/a/ /?a=1,2&b=3 /#/spa /top#top /own/'
    const wrong = ['shop', '?q=a', '//example.org/', 'http://***@localhost/', '/a b']
    const rest = 'shop ?q=a //example.org/ http://me:secret@localhost/ /a\u200bb'
    setEnvironment(t, { FTW_MONITOR_WARMUP: `${plain} /caf%C3%A9 /für?q=ä ${rest}` })
    const seen: string[] = []
    const handler: http.RequestListener = ({ url = '' }, response) => {
      seen.push(url)
      response.end('a page')
    }
    const performers = { '/own': () => void seen.push('own performer') }
    const setup = { performers, handler, until: 'started' } as const
    const { monitor, port, logger } = await bootInstance(t, setup)
    const form = 'a page is a path like /shop or /search?q=a'
    const failures = wrong.map((page) => `${page}: cannot be used: ${form}`)
    const reason = `Warmup failed: ${failures.join('; ')}`
    await untilVerdict(monitor, reason)
    assert.equal(await ask(port, 'health_check\n'), `${reason}\n`)
    const warning = `warn ftw-monitor cannot use ${wrong.join(' ')} of FTW_MONITOR_WARMUP: ${form}`
    assert.ok(warningsOf(logger).includes(warning), warningsOf(logger).join('\n'))

    const ascii = ['/shop/', '/', '/a;b', '/hats', '/search/?next=/a/', '/?a=1,2&b=3', '/top']
    const loaded = [...ascii, '/caf%C3%A9', '/f%C3%BCr?q=%C3%A4']
    assert.deepEqual(seen, ['own performer', ...loaded])
    const { warmup } = await monitor.status()
    const warm = warmup.filter(({ status }) => status === 'warm').map(({ site }) => site)
    const sites = loaded.map((page) => page.replace(/(?<=\w)\/(?=$|\?)/, ''))
    assert.deepEqual(warm, ['/own', ...sites])
    seen.length = 0
    for (const site of ['/shop', '/search?next=/a/', '/?a=1,2&b=3']) {
      assert.equal(await ask(port, `warmup ${site}\n`), 'Warmup successful\n')
    }
    assert.deepEqual(seen, ['/shop/', '/search/?next=/a/', '/?a=1,2&b=3'])
  })

  test('the failed sites alone are tried again, after a pause that doubles, and at once when a database is back', async (t) => {
    const timers = takeTimers(t)
    let isConnected = true
    const sites = recordSites('/', '/good', '/bad')
    const noStock = new Error('no stock')
    sites.failures = { '/': noStock, '/bad': noStock }
    const { monitor, port, logger } = await bootInstance(t, {
      databases: { main: { isConnected: () => isConnected } },
      performers: sites.performers,
      until: 'started'
    })
    const untilTold = (seconds: number, why = '/bad: no stock') => {
      const line = `warn ftw-monitor tries again in ${seconds} s: ${why}`
      return until(() => logger.lines.includes(line), line)
    }
    await untilTold(1, 'no stock; /bad: no stock')
    sites.calls.length = 0
    timers.pass(500)
    await nextTurn()
    assert.deepEqual(sites.calls, [])
    sites.failures = { '/bad': noStock }
    timers.pass(1_000)
    await untilTold(2)
    assert.deepEqual(sites.calls, ['/', '/bad'])
    const shown = /\/bad +failed after \d+\.\d s; next try in 2 s: no stock$/m
    assert.match(await ask(port, 'status\n'), shown)
    timers.pass(2_500)
    await untilTold(4)
    assert.deepEqual(sites.calls, ['/', '/bad', '/bad'])

    isConnected = false // no time passes
    const reason = "Error: Database 'main' disconnected."
    await untilVerdict(monitor, reason)
    isConnected = true
    await Promise.all(Array.from({ length: 100 }, () => monitor.health()))
    await untilTold(8)
    assert.deepEqual(sites.calls, ['/', '/bad', '/bad', '/bad'])
    const failed = 'Warmup failed: no stock; /bad: no stock'
    const reasons = ['Instance is booting', 'Warmup in progress', failed, reason]
    assert.deepEqual((await reasonsOf(monitor)).slice(0, 4), reasons)

    sites.failures = {}
    timers.pass(8_500)
    await untilVerdict(monitor)
    assert.equal(sites.calls.length, 5)
    assert.equal((await monitor.status()).warmup[2]?.nextTrySeconds, -1)
    assert.equal(logger.lines.filter((line) => line.includes('tries again')).length, 4)
  })

  test('performers get their site, its url, which FTW_MONITOR_URL and url outdo, and a signal, in order of registration', async (t) => {
    const calls: unknown[] = []
    const keep: WarmupPerformer = ({ site, url, signal }) => {
      calls.push([site, url, signal.aborted])
    }
    const performers = { '/shop': keep, '/': keep, '/a/b': keep, '/blog/': keep }
    const server = await serve(t)
    const port = portOf(server)
    const rows: [variable: string, options: StartOptions, base: string][] = [
      ['', {}, `http://127.0.0.1:${port}`],
      [`http://localhost:${port}/base`, {}, `http://localhost:${port}/base`],
      ['http://localhost', { url: 'http://127.0.0.1:9/' }, 'http://127.0.0.1:9']
    ]
    for (const [variable, options, base] of rows) {
      setEnvironment(t, { FTW_MONITOR_URL: variable })
      calls.length = 0
      const { monitor } = await bootInstance(t, { performers, server, options })
      await monitor.stop()
      assert.deepEqual(calls, [
        ['/shop', `${base}/shop`, false],
        ['/', base, false],
        ['/a/b', `${base}/a/b`, false],
        ['/blog', `${base}/blog`, false]
      ])
    }
  })

  test('warmupView mounts in http, Connect and Express', async (t) => {
    const port = await freePort()
    setEnvironment(t, { PORT: String(port), HOST: '127.0.0.1' })
    const { calls, performers } = recordSites('/', '/shop')
    const monitor = await importMonitor(t)
    for (const site of ['/', '/shop']) monitor.registerWarmup(site, performers[site]!)
    const plain = await serve(t, (request, response) => {
      const { writeHead } = response
      const giveNothing = (...all: unknown[]) => void Reflect.apply(writeHead, response, all)
      response.writeHead = giveNothing as unknown as typeof writeHead // as some middleware has it
      monitor.warmupView(request, response)
    })
    const server = http.createServer((request, response) => {
      const { url = '' } = request
      if (url.startsWith('/shop/')) {
        // as Express does for app.use('/shop', warmupView)
        Object.defineProperty(request, 'originalUrl', { value: url })
        request.url = url.slice('/shop'.length)
      }
      monitor.warmupView(request, response, () => response.end(`next ${request.url}`))
    })
    for (const each of [hide(plain), hide(server)]) closeLater(t, each) // else it is there by itself
    await monitor.start({ logger: recorder() })
    await once(server.listen(port, '127.0.0.1'), 'listening')
    await untilHealthy(port + 80)
    assert.deepEqual(calls, ['/', '/shop'])
    const rows: [port: number, path: string, status: number, body: string, calls: string[]][] = [
      [port, '/@@warmup', 200, 'Warmup successful\n', ['/', '/shop']],
      [port, '/shop/@@warmup', 200, 'Warmup successful\n', ['/shop']],
      [port, '/shop/hats', 200, 'next /hats', []],
      [port, '/other', 200, 'next /other', []],
      [portOf(plain), '/@@warmup', 200, 'Warmup successful\n', ['/', '/shop']],
      [portOf(plain), '/other', 404, 'Not found\n', []]
    ]
    for (const [at, path, status, body, expected] of rows) {
      calls.length = 0
      const page = await getPage(at, path)
      assert.deepEqual([page.status, page.body, calls], [status, body, expected], path)
    }
  })

  test('where the view is not mounted, only the performers make an instance green', async (t) => {
    const handlers: Record<string, http.RequestListener> = {
      'a catch-all route': (_, response) => void response.end('Warmup successful'),
      'a redirect': (_, response) => void response.writeHead(302, { Location: '/login' }).end(),
      'a reset': ({ socket }) => void socket.resetAndDestroy()
    }
    setEnvironment(t, { HOST: '127.0.0.1' })
    const boot = async ([what, handler]: [string, http.RequestListener]) => {
      const sites = recordSites('/')
      sites.gate = latch()
      const mayAnswer = latch()
      const asked: unknown[] = []
      const server = await serve(t, async (request, response) => {
        asked.push(request.url)
        await mayAnswer.opened
        handler(request, response)
      })
      const options = { server: [], port: portOf(hide(server)) }
      const { performers } = sites
      const setup = { server, performers, options, until: 'started' } as const
      const { port } = await bootInstance(t, setup)
      await until(() => asked.length > 0, 'the view is asked for')
      assert.equal(await ask(port, 'health_check\n'), 'Instance is booting\n', what)
      assert.equal(await ask(port, 'warmup_state\n'), '0 0\n')
      mayAnswer.open()
      await until(() => sites.calls.length === 1, `the performer runs in spite of ${what}`)
      assert.equal(await ask(port, 'health_check\n'), 'Warmup in progress\n', what)
      sites.gate.open()
      await untilHealthy(port)
      assert.deepEqual([sites.calls, asked], [['/'], ['/@@warmup']], what)
    }
    await Promise.all(Object.entries(handlers).map(boot))

    const silent = hide(await serve(t, () => {}))
    const timers = takeTimers(t)
    const bootSilent = async () => {
      const asked = once(silent, 'request')
      const { calls, performers } = recordSites('/')
      const options = { server: [], port: portOf(silent) }
      const setup = { server: silent, performers, options, until: 'started' } as const
      const { monitor } = await bootInstance(t, setup)
      const [{ socket }] = (await asked) as [http.IncomingMessage]
      return { monitor, calls, closed: once(socket, 'close') }
    }
    const stopped = await bootSilent()
    await stopped.monitor.stop()
    await inTime(stopped.closed, 'stop() gives the view up', 5_000)
    const unanswered = await bootSilent()
    timers.pass(10_000)
    await until(() => unanswered.calls.length === 1, 'after 10 s the performer runs', 5_000)
  })

  test('where the program has replaced fetch or crypto the instance warms up, by streams of Node.js, too', async (t) => {
    const options = { url: 'https://localhost:9' } // of which pages are loaded by fetch
    const fetchPage = t.mock.method(globalThis, 'fetch', thrower as typeof fetch)
    await bootInstance(t, { performers: WARM, options })

    const asked: unknown[] = []
    const fetchStream = async (url: unknown) => {
      asked.push(url)
      return { status: 200, body: Readable.from(['a page']) }
    }
    fetchPage.mock.mockImplementation(fetchStream as unknown as typeof fetch)
    await bootInstance(t, { options })
    assert.deepEqual(asked, [`${options.url}/@@warmup`, options.url])

    const before = Object.getOwnPropertyDescriptor(globalThis, 'crypto')!
    t.after(() => Object.defineProperty(globalThis, 'crypto', before))
    Object.defineProperty(globalThis, 'crypto', { value: undefined, configurable: true })
    await bootInstance(t, { performers: WARM })
  })

  test('a warm-up that hangs is told after 60 s, and each time it has run twice as long, and to the command warmup every 10 s; after 30 minutes its signal aborts it', async (t) => {
    const timers = takeTimers(t, ['setInterval', 'setTimeout'], fakeClock(t))
    const gate = latch()
    const signals: AbortSignal[] = []
    const keep: WarmupPerformer = ({ site, signal }) => {
      signals.push(signal)
      return site === '/last' ? hang() : gate.opened
    }
    const performers = { '/shop': keep, '/last': keep }
    const { monitor, port, logger } = await bootInstance(t, { performers, until: 'started' })
    const told = () => logger.lines.filter((line) => line.includes('running'))
    await until(() => signals.length === 1, '/shop runs')
    const peer = await converse(t, port)
    peer.say('warmup /shop\n')
    await untilSeen(port)
    for (const seconds of [10, 20, 30, 40, 50]) {
      timers.pass(10_000)
      await peer.hear(`Has been warming up /shop for ${seconds} s\n`)
    }
    timers.pass(9_750)
    assert.deepEqual(told(), [])
    timers.pass(500)
    assert.deepEqual(told(), ['warn ftw-monitor /shop still running after 60 s'])
    await peer.hear('Has been warming up /shop for 60 s\n')

    gate.open()
    await peer.hear('Warmup successful\n')
    await until(() => peer.isClosed, 'the command is over')
    await until(() => signals.length === 2, '/last runs')
    timers.pass(30 * 60_000 - 250) // what waited for its turn is told since it runs
    const ofLast = [60, 120, 240, 480, 960].map(
      (seconds) => `warn ftw-monitor /last still running after ${seconds} s`
    )
    assert.deepEqual(told().slice(1), ofLast)
    assert.equal(signals[1]?.aborted, false)
    timers.pass(500)
    assert.equal(signals[1]?.aborted, true)
    assert.equal(signals[0]?.aborted, false, 'it is over')
    await untilVerdict(monitor, 'Warmup failed: /last: no end after 30 minutes')
  })

  test('a page that is not answered is warned of once, after 10 s', async (t) => {
    const timers = takeTimers(t)
    const server = await startListening(t, http.createServer()) // as ws has it
    server.on('upgrade', (_, socket) => socket.destroy())
    const connected = t.mock.fn()
    server.on('connection', connected)
    const { port, logger } = await bootInstance(t, { server, until: 'started' })
    await until(() => connected.mock.callCount() === 2, 'it asks for the view, and for the page')
    timers.pass(9_000)
    assert.deepEqual(warningsOf(logger), [])
    timers.pass(50_000)
    const whom = `http://127.0.0.1:${portOf(server)}; if it never answers`
    const warning = `warn ftw-monitor gets no answer from ${whom}, register a warm-up performer`
    assert.deepEqual(warningsOf(logger), [warning])
    assert.equal(await ask(port, 'health_check\n'), 'Warmup in progress\n')
  })
})

/** What an instance says, and for what it is asked, until its warm-up is over, with a certificate that
 *  it trusts; `env` has its module, and its URL without the port, '' for none. */
async function judgeInstance(t: TestContext, env: Record<string, string>): Promise<string> {
  const script = `
    import { readFileSync } from 'node:fs'
    const { MODULE, KEY, CERT, URL } = process.env
    const { default: module } = await import('node:' + MODULE)
    const create = module.createSecureServer ?? module.createServer
    const files = { key: readFileSync(KEY), cert: readFileSync(CERT) }
    const server = create(files, ({ url, headers }, response) => {
      print(url, headers.authorization)
      response.end()
    })
    await new Promise((resolve) => server.listen(0, 'localhost', resolve))
    const url = URL ? URL + ':' + server.address().port : undefined
    await monitor.start({ server, url, listen: { host: '127.0.0.1', port: 0 } })
    while (/booting|progress/.test((await monitor.health()).reason)) await pause(20)
    print((await monitor.health()).reason)
    process.exit()`
  const { keyFile, certFile } = certify(t, 'localhost')
  const files = { KEY: keyFile, CERT: certFile, NODE_EXTRA_CA_CERTS: certFile }
  const watched = runScript(t, { script, env: { ...files, ...env }, flags: ['--no-warnings'] })
  assert.equal(await inTime(watched.exit, 'it is judged', 8_000), 0, watched.output)
  return watched.output
}

describeInProcess('Warm-up', PAIRWISE, () => {
  test('over TLS it is green, or is told what to set', needs('openssl'), async (t) => {
    const trusted = { MODULE: 'https', URL: 'https://localhost' }
    const untrusted = { ...trusted, NODE_EXTRA_CA_CERTS: '' }
    assert.match(await judgeInstance(t, untrusted), /^Warmup failed: .*NODE_EXTRA_CA_CERTS/m)
    const unnamed = { ...trusted, URL: '' }
    assert.match(await judgeInstance(t, unnamed), /^Warmup failed: .*FTW_MONITOR_URL/m)

    for (const module of ['https', 'http2']) {
      const output = await judgeInstance(t, { ...trusted, MODULE: module })
      assert.match(output, /^OK$/m)
      const isLoadedByFetch = module === 'https' || NODE_MAJOR >= 26 // which knows HTTP/2 since then
      assert.equal(output.split('speaks no HTTP/1').length - 1, isLoadedByFetch ? 0 : 1)
    }
  })

  test('our own requests go past a proxy of the environment', needs('openssl'), async (t) => {
    const onConnection = t.mock.fn((socket: net.Socket) => void socket.on('error', () => {}))
    const proxy = await startListening(t, net.createServer(onConnection)) // which answers nothing
    const address = `http://127.0.0.1:${portOf(proxy)}`
    const env = { NODE_USE_ENV_PROXY: '1', http_proxy: address, HTTPS_PROXY: address }
    const page = new RegExp(`^/ Basic ${btoa('ad:min')}$`, 'm')
    for (const scheme of ['http', 'https']) {
      const setup = { ...env, MODULE: scheme, URL: `${scheme}://ad:min@localhost` }
      // Before Node.js 22.21 fetch did not heed the environment.
      const isLeftOut = scheme === 'https' && NODE_MAJOR > 20
      const expected = isLeftOut ? /^Warmup failed: .*NO_PROXY$/m : page
      assert.match(await judgeInstance(t, setup), expected)
      assert.match(await judgeInstance(t, { ...setup, NO_PROXY: 'localhost' }), page)
    }
    assert.equal(onConnection.mock.callCount(), 0)
  })

  for (const begin of ['monitor.start()', 'monitor.start(server)']) {
    const name = `a warm-up that hangs does not keep the process alive, started by ${begin}`
    // Without the server it waits for 10 s for whether the instance has a view.
    test(name, begin.includes('server') ? {} : SLOW, async (t) => {
      const script = `
        let isPageAsked = false
        const server = http.createServer(({ url }) => {
          isPageAsked = url === '/'
        })
        server.listen(process.env.PORT, '127.0.0.1')
        ${begin}
        while (!isPageAsked) await pause(20)
        server.close()
        print('closed')`
      const env = { HOST: '127.0.0.1', PORT: String(await freePort()) }
      const watched = runScript(t, { script, env })
      await until(() => watched.stdout.includes('closed\n'), 'the server is closed')
      assert.equal(await inTime(watched.exit, 'the process ends'), 0, watched.output)
    })
  }
})

// --- The health path -----------------------------------------------------------------------------

describeInProcess('The health path', TOGETHER, () => {
  test('the own port of the service answers GET and HEAD there, before the service sees it, and its connection delays no end', async (t) => {
    const seen: string[] = []
    const handler: http.RequestListener = ({ method, url }, response) => {
      seen.push(`${method} ${url}`)
      response.end('own')
    }
    const { monitor, port, instancePort } = await bootInstance(t, { ...READY, handler })
    for (const path of ['/ready', '/ready?', '/ready?verbose=1&a=/', 'http://a/ready']) {
      const { status, headers, body } = await getPage(instancePort, path)
      assert.deepEqual([status, body], [200, 'OK\n'], path)
      assert.equal(headers['cache-control'], 'no-store')
      assert.equal(headers['content-length'], '3')
    }
    const head = await getPage(instancePort, '/ready', { method: 'HEAD' })
    assert.deepEqual([head.status, head.body, head.headers['content-length']], [200, '', '3'])
    assert.deepEqual([seen, await askRequests(port)], [[], 0])
    for (const path of ['/ready/', '/readyz', '/', '/a?/ready']) {
      assert.equal((await getPage(instancePort, path)).body, 'own', path)
    }
    assert.equal((await getPage(instancePort, '/ready', { method: 'POST' })).body, 'own')
    assert.deepEqual([seen.length, await askRequests(port)], [5, 5])

    const peer = await converse(t, instancePort)
    peer.say(headOf('/ready'))
    await until(() => peer.transcript.endsWith('OK\n'), 'it is answered')
    const ms = await timeOf(monitor.shutdown({ timeoutMs: 60_000, exitAfterMs: 120_000 }))
    assert.ok(ms < 4_500, `${ms} ms`) // five seconds after its last byte, half a head is given up
    assert.ok(peer.isClosed)
  })

  test('it is answered over HTTP/2, also where the service listens for streams', async (t) => {
    const seen: string[] = []
    for (const event of ['request', 'stream']) {
      const listener = http2.createServer().on(event, () => seen.push(event))
      const server = await startListening(t, listener)
      const { monitor, port } = await bootInstance(t, { ...READY, server })
      const session = await connectSession(t, portOf(server))
      for (const [method, reply] of Object.entries({ GET: 'OK\n', HEAD: '' })) {
        const stream = session!.request({ ':path': '/ready?a', ':method': method })
        const [headers] = await once(stream, 'response')
        const answer = [headers[':status'], headers['cache-control'], await readAll(stream)]
        assert.deepEqual(answer, [200, 'no-store', reply])
      }
      assert.deepEqual([seen, await askRequests(port)], [[], 0])
      const told = once(session!, 'goaway')
      const drained = monitor.drain()
      assert.match(await askStream(session, '/ready'), /^Draining/)
      await inTime(told, 'the session is told to go elsewhere')
      await drained
    }
  })

  test('a prober there is an address together with its User-Agent, and none who comes through a proxy, nor a browser, nor who asks for livez, the status or the page, but who asks for readyz, and a balancer that claims to be like Mozilla', async (t) => {
    const { monitor, port, instancePort } = await bootInstance(t, READY)
    for (const name of ['X-Forwarded-For', 'Forwarded', 'Via', 'X-Real-IP']) {
      await getPage(instancePort, '/ready', { headers: { [name]: '10.1.1.1' } })
    }
    const head = 'GET /health_check HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n'
    await askTimes(3, port, `${head}Sec-Fetch-Site: cross-site\r\n\r\n`)
    await askTimes(3, port, `${head}User-Agent: Mozilla/5.0 (X11)\r\n\r\n`) // without TLS
    for (let time = 0; time < 3; time++) {
      for (const path of ['/status', '/livez']) await getPage(port, path)
      for (const line of ['status\n', 'livez\n']) await ask(port, line)
      await openPage(port)
    }
    assert.deepEqual((await monitor.status()).probers, [])
    assert.equal(await askWhomItWaitsFor(port), 0)
    for (let time = 0; time < 3; time++) await getPage(port, '/readyz')
    assert.equal(await askWhomItWaitsFor(port), 1)
    assert.equal(await ask(port, 'readyz\n'), 'OK\n')

    const cloudflare = 'Mozilla/5.0 (compatible; Cloudflare-Traffic-Manager/1.0; pool-id: 1)'
    await getPage(port, '/health_check', { headers: { 'User-Agent': cloudflare } })
    const evil = `evil${EVIL.replaceAll(/[^ -~]/g, '')}${'x'.repeat(200)}`
    const agents = ['one/1.0', 'other', evil, cloudflare]
    for (const agent of [...agents, ...agents]) {
      await getPage(instancePort, '/ready', { headers: { 'User-Agent': agent } })
    }
    await getPage(instancePort, '/ready')
    const { probers } = await monitor.status()
    const addresses = probers.map(({ address }) => address)
    assert.equal(addresses.length, 6)
    for (const agent of ['one/1.0', 'other', 'no User-Agent']) {
      assert.ok(addresses.includes(`127.0.0.1 (${agent})`), addresses.join())
    }
    for (const address of addresses) assert.ok(address.length < 110, address)
  })
})

describeInProcess('The health path', ALONE, () => {
  test('FTW_MONITOR_HEALTH_PATH names it, whatever its query; what is no path becomes one or none, with one warning', async (t) => {
    const rows: [text: string, outcome: string][] = [
      ['/ready?deep=1', ''],
      ['ready', 'uses /ready'],
      ['//ready', 'uses /ready'],
      ['/ready, /live', 'uses /ready'],
      ['https://example.org/ready#now', 'uses /ready'],
      ['https://example.org', 'there is none'],
      ['//', 'there is none']
    ]
    for (const [text, outcome] of rows) {
      setEnvironment(t, { FTW_MONITOR_HEALTH_PATH: text })
      const { instancePort, logger } = await bootInstance(t, { performers: WARM })
      const expected = outcome === 'there is none' ? 'hello' : 'OK\n'
      assert.equal((await getPage(instancePort, '/ready?deep=1')).body, expected, text)
      assert.equal((await getPage(instancePort, '/')).body, 'hello', text)
      const trouble = `cannot use FTW_MONITOR_HEALTH_PATH=${text}: it must be a path, as /ready`
      const warnings = outcome === '' ? [] : [`warn ftw-monitor ${trouble}; ${outcome}`]
      assert.deepEqual(warningsOf(logger), warnings)
    }
  })

  test('where the monitor is switched off, the health path is green until the end, the option rather than the variable', async (t) => {
    setEnvironment(t, { FTW_MONITOR_HEALTH_PATH: '/ready', FTW_MONITOR: '0' })
    const monitor = await importMonitor(t)
    const { server, held, letGo } = await serveHeld(t)
    monitor.registerDatabase('main', { isConnected: () => false })
    const logger = recorder()
    assert.equal(await monitor.start({ server, logger, healthPath: '/live' }), false)
    const askAt = async (path: string) => {
      const { status, body } = await getPage(portOf(server), path)
      return `${status} ${body}`
    }
    assert.equal(await askAt('/live'), '200 OK\n')
    assert.equal(await askAt('/ready'), '200 served')
    assert.deepEqual(logger.lines, [])

    const answer = getPage(portOf(server), '/held')
    await until(() => held.length > 0, 'a request is in flight')
    const ended = monitor.shutdown()
    assert.equal(await askAt('/live'), '503 Draining\n')
    letGo()
    await answer
    await ended
  })
})

// --- Probers -------------------------------------------------------------------------------------

describeInProcess('Probers', ALONE, () => {
  test('of more than 64 addresses the one that asks least often makes room, and who has many names at the health path pushes out its own', async (t) => {
    const timers = takeTimers(t)
    const { monitor, port, instancePort } = await bootInstance(t, READY)
    const everyone = Array.from({ length: 64 }, (_, index) => `127.0.1.${index + 1}`)
    for (let round = 0; round < 3; round++) {
      await Promise.all(everyone.map((from) => askAsProber(port, from)))
      timers.pass(1_000)
    }
    assert.equal(await askWhomItWaitsFor(port), 64) // who asked at the same moments
    for (let index = 0; index < 20; index++) await askAsProber(port, `127.0.2.${index + 1}`)
    const known = async (prefix: string) => {
      const addresses = (await monitor.status()).probers.map(({ address }) => address)
      assert.equal(addresses.length, 64)
      return addresses.filter((address) => address.startsWith(prefix))
    }
    assert.equal((await known('127.0.1.')).length, 63, 'one made room, then each passer-by')
    await askAsProber(port, '127.0.3.1', 3)
    assert.deepEqual(await known('127.0.3.'), ['127.0.3.1'], 'the new one is known')
    assert.deepEqual(await known('127.0.2.'), [], 'the last passer-by made room')

    for (let index = 0; index < 100; index++) {
      const options = { headers: { 'User-Agent': `balancer ${index}` }, from: '127.0.0.9' }
      for (let time = 0; time < 2; time++) await getPage(instancePort, '/ready', options)
    }
    assert.ok((await known('127.0.1.')).length >= 61)
  })

  test('a prober is an address that asked three times in the 60 s before, and still asks, by its own pace', async (t) => {
    setEnvironment(t, { FTW_MONITOR_TIMEOUT_MS: '200000' }) // else some ask too seldom to be told
    const timers = takeTimers(t)
    const { monitor, port } = await bootInstance(t, { performers: WARM })
    await askAsProber(port)
    timers.pass(5_000)
    await askAsProber(port)
    assert.equal(await askWhomItWaitsFor(port), 0)
    timers.pass(5_000)
    await askAsProber(port)
    await askAsProber(port, '127.0.0.3', 4)
    assert.equal(await askWhomItWaitsFor(port), 2)
    timers.pass(1_000)
    assert.equal(await askWhomItWaitsFor(port), 2, 'a second is no pause')
    timers.pass(250)
    assert.equal(await askWhomItWaitsFor(port), 1, 'who asked at once asks no more')
    timers.pass(14_750)
    assert.equal(await askWhomItWaitsFor(port), 1, 'three of its pauses and a second')
    timers.pass(250)
    assert.equal(await askWhomItWaitsFor(port), 0, 'who has stopped asking is not waited for')

    const waitsFor: number[] = []
    for (const pauseMs of [3_600_000, 30_000, 30_250, 35_000]) {
      timers.pass(pauseMs) // the first is no pause of its own
      await askAsProber(port)
      timers.pass(1_000) // a pause counts as long as it still asks
      waitsFor.push(await askWhomItWaitsFor(port))
    }
    assert.deepEqual(waitsFor, [0, 0, 1, 0], 'three times in 65 s')
    assert.equal((await monitor.status()).probers[0]?.intervalSeconds, 21.65)

    await askAsProber(port, '127.0.0.4')
    timers.pass(3_600_000) // an absence is no pause
    await askAsProber(port, '127.0.0.4', 3)
    assert.equal((await monitor.status()).probers.at(-1)?.intervalSeconds, 0)
    const drained = monitor.drain()
    timers.pass(750)
    assert.equal(await isPendingFor(300, drained), true)
    timers.pass(500)
    await inTime(drained, 'who stops asking meanwhile is not waited for', 10_000)
  })

  test('a prober of the health path is told, also where the monitor has no port of its own', async (t) => {
    const timers = takeTimers(t)
    const taken = await freePort()
    await occupy(t, taken)
    const agent = new http.Agent({ keepAlive: true })
    t.after(() => agent.destroy())
    for (const listen of [LOOPBACK, { host: '127.0.0.1', port: taken }]) {
      const server = await serve(t)
      const monitor = await importMonitor(t)
      await monitor.start({ server, listen, healthPath: '/ready', logger: recorder() })
      await untilVerdict(monitor)
      const askReady = () => getPage(portOf(server), '/ready', { agent })
      for (let round = 0; round < 3; round++) {
        timers.pass(500)
        assert.equal((await askReady()).status, 200)
      }
      const ended = monitor.shutdown({ fall: 2 })
      for (let round = 0; round < 2; round++) {
        assert.equal(await isPendingFor(200, ended), true)
        const { status, headers, body } = await askReady()
        assert.deepEqual([status, headers.connection, body], [503, 'close', 'Draining\n'])
        timers.pass(500)
      }
      await ended
    }
  })

  test('that a prober asks too seldom for the time that a shutdown has is said beforehand, once', async (t) => {
    const timers = takeTimers(t)
    const hear = async (timeoutMs: number, everyMs: number) => {
      const { monitor, port, logger } = await bootInstance(t, { performers: WARM })
      monitor.shutdownOnSignal({ timeoutMs })
      for (let time = 0; time < 15; time++) {
        await askAsProber(port)
        timers.pass(everyMs)
      }
      await monitor.stop()
      return logger.lines.filter((line) => line.includes('timeoutMs'))
    }
    assert.deepEqual(await hear(5_000, 250), [])
    const lines = await hear(1_500, 500)
    assert.equal(lines.length, 1)
    assert.match(lines.join(), /^info ftw-monitor .*127\.0\.0\.2 asks every 0\.5 s\b/)
    assert.match(lines.join(), /\b1\.2 s\b/) // the time for telling: four fifths
  })
})

// --- Draining ------------------------------------------------------------------------------------

/** An instance with a request in flight, until it is let go. */
async function bootWithRequest(t: TestContext, options: PageOptions = {}) {
  const { server, held, letGo } = await serveHeld(t)
  const instance = await bootInstance(t, { server, performers: WARM })
  const request = getPage(instance.instancePort, '/held', options)
  await until(() => held.length === 1, 'a request is in flight')
  const finishRequest = () => {
    letGo()
    return request
  }
  return { ...instance, finishRequest }
}

/** The connection of an operator, by which the instance drains. */
async function drainByLine(t: TestContext, port: number): Promise<Peer> {
  const talk = await converse(t, port)
  talk.say('drain\n')
  await until(() => talk.transcript !== '', 'it drains')
  return talk
}

describeInProcess('Draining', TOGETHER, () => {
  test('while drained the verdict is the reason, before everything else, and who asks as a drain ends hears what a database says then', async (t) => {
    let isConnected = false
    const databases = { main: { isConnected: () => isConnected } }
    const setup = { databases, performers: WARM, until: 'started' } as const
    const { monitor, port } = await bootInstance(t, setup)
    let askers = 1 // a new one each time: who asks three times is waited for
    const expectReason = async (reason: string) => {
      assert.deepEqual(await monitor.health(), { healthy: false, reason })
      askers++
      const reply = await ask(port, 'health_check\n', { from: `127.0.0.${askers}` })
      assert.equal(reply, `${reason}\n`)
    }
    await expectReason("Error: Database 'main' disconnected.")
    await monitor.drain()
    await expectReason('Draining')
    monitor.resume()
    await expectReason("Error: Database 'main' disconnected.")
    await monitor.drain({ reason: 'LOOKOUT\nOK' })
    await expectReason('LOO KOUT O K')
    monitor.resume()
    assert.match(await ask(port, 'drain  Out for   the night\n'), /^(Draining: .*\n)+Drained\n$/)
    await expectReason('Out for the night')
    assert.equal((await ask(port, 'resume\n')).split('\n').length, 2)
    await expectReason("Error: Database 'main' disconnected.")

    isConnected = true
    await untilVerdict(monitor)
    await monitor.drain()
    isConnected = false
    const asked = monitor.health()
    monitor.resume()
    assert.equal((await asked).reason, "Error: Database 'main' disconnected.")
  })

  test('drain({ fall }) waits for so many answers of each, of which one to agent_check counts as three', async (t) => {
    const { monitor, port } = await bootInstance(t, { performers: WARM })
    const agent = () => ask(port, 'agent_check\n')
    const other = () => ask(port, 'agent_check\n', { from: '127.0.0.2' })
    const check = () => ask(port, 'health_check\n', { from: '127.0.0.2' })
    const rows: [options: DrainOptions, told: (typeof agent)[], last: typeof agent][] = [
      [{ fall: 5 }, [agent, agent, check, check, check, check], check],
      [{ fall: 6 }, [agent, agent, other], other],
      [{ fall: 4 }, [agent, agent, other], check],
      [{}, [agent], other]
    ]
    for (const [options, told, last] of rows) {
      for (const askOnce of [agent, agent, other, other, check, check]) await askOnce()
      const drained = monitor.drain(options)
      for (const askOnce of told) await askOnce()
      assert.equal(await isPendingFor(200, drained), true)
      await last()
      await inTime(drained, 'the last answer ends it')
      monitor.resume()
    }
  })

  test('the command `drain` tells what it waits for, line by line, until `Drained`: not for upgraded connections, and though somebody hung up', async (t) => {
    const { monitor, server, port, instancePort, finishRequest } = await bootWithRequest(t)
    echoUpgrades(server)
    const peers = [await upgrade(t, instancePort), await upgrade(t, instancePort)]
    for (const from of ['127.0.0.1', '127.0.0.2']) await askAsProber(port, from, 3)
    for (const leave of ['destroy', 'resetAndDestroy'] as const) {
      const { socket } = await drainByLine(t, port)
      socket[leave]()
      await untilSeen(port)
      assert.equal((await monitor.health()).reason, 'Draining')
    }

    const talk = await drainByLine(t, port)
    const upgraded = ', 2 upgraded connections\n'
    await talk.hear(`Draining: 0 of 2 probers know, 1 request in flight${upgraded}`)
    await ask(port, 'agent_check\n', { from: '127.0.0.2' })
    await talk.hear(`Draining: 1 of 2 probers know, 1 request in flight${upgraded}`)
    await finishRequest()
    await talk.hear(`Draining: 1 of 2 probers know, 0 requests in flight${upgraded}`)
    await ask(port, 'agent_check\n')
    await until(() => talk.isClosed, 'the connection is closed')
    await talk.hear(`Draining: 2 of 2 probers know, 0 requests in flight${upgraded}Drained\n`)

    peers[0]?.say('still here')
    await peers[0]?.hear('still here')
  })

  test('a session of HTTP/2 is told once to go elsewhere, with its next stream when all probers know', async (t) => {
    const listener = http2.createServer((_, response) => response.end('served'))
    const server = await startListening(t, listener)
    const { monitor, port } = await bootInstance(t, { server, performers: WARM })
    const session = await connectSession(t, portOf(server))
    const told: number[] = []
    session!.on('goaway', (code) => told.push(code))
    await askTimes(3, port, 'agent_check\n')
    const drained = monitor.drain()
    for (let streams = 0; streams < 2; streams++) {
      assert.equal(await askStream(session), 'served')
    }
    assert.deepEqual(told, [])
    await ask(port, 'agent_check\n')
    await until(() => askStream(session).then(() => told.length > 0), 'it is told')
    await inTime(drained, 'it is drained')
    assert.equal(told.length, 1)
  })

  test('drain() while the server is closed holds when it listens again', async (t) => {
    const { monitor, server, port, instancePort } = await bootInstance(t, { performers: WARM })
    await close(server)
    await until(() => isRefused(port), 'the monitor is closed')
    await monitor.drain({ reason: 'Stays out' })
    await startListening(t, server, { host: '127.0.0.1', port: instancePort })
    await until(() => monitor.status().then(({ state }) => state === 'draining'), 'it drains')
    assert.deepEqual(await monitor.health(), { healthy: false, reason: 'Stays out' })
    monitor.resume()
    await untilVerdict(monitor)
  })
})

describeInProcess('Draining', ALONE, () => {
  test('a drain soon after a long one still waits for its probers, and after a flood, in which one may be missed, it takes its time, but is over when the server has closed, since nobody can be told then', async (t) => {
    const timers = takeTimers(t)
    const { monitor, server, port } = await bootInstance(t, { performers: WARM })
    const askThrice = () => askAsProber(port, '127.0.0.2', 3)
    await askThrice()
    const first = monitor.drain()
    await askThrice()
    await first
    timers.pass(62_000)
    await askThrice()
    monitor.resume()
    assert.equal(await ask(port, 'health_check\n', { from: '127.0.0.2' }), 'OK\n')
    const second = monitor.drain()
    await askAsProber(port)
    assert.ok(await isPendingFor(300, second)) // three times the quiet that suffices
    await askThrice()
    await second
    monitor.resume()

    await askAsProber(port, '127.0.0.2', 200)
    const third = timeOf(monitor.drain({ timeoutMs: 500 }))
    await askThrice()
    assert.ok((await third) >= 490)
    monitor.resume()

    await askThrice()
    const last = monitor.drain()
    assert.equal(await isPendingFor(200, last), true)
    server.close()
    await inTime(last, 'it is drained', 10_000) // not after 25 s
  })

  test('while the event loop stood still it was not quiet: what came then is still to be read', async (t) => {
    const timers = takeTimers(t, ['setTimeout'], fakeClock(t))
    const { monitor } = await bootInstance(t, { performers: WARM, until: 'started' })
    const events: string[] = []
    void monitor.drain().then(() => events.push('drained'))
    await nextTurn()
    timers.stall(200)
    for (const expected of [[], [], ['drained']]) {
      timers.pass(25)
      await nextTurn()
      assert.deepEqual(events, expected)
    }
  })

  test('after 25 s the command `drain` gives up, and says what it waited for, also that requests keep coming, and drain() resolves when none has been in flight for 100 ms, and by resume() and by stop(), as does a second one', async (t) => {
    const { monitor, port, instancePort, finishRequest } = await bootWithRequest(t)
    const clock = fakeClock(t)
    const first = await drainByLine(t, port)
    clock.now += 24_900
    await pause(100) // for it to look at the clock more than once
    assert.match(first.transcript, /^(Draining: .*\n)+$/)
    clock.now += 100
    await until(() => first.isClosed, 'it gives up')
    const waited = /\nNot drained after 25 s: 0 of 0 probers know, 1 request in flight\n$/
    assert.match(first.transcript, waited)
    assert.equal(await ask(port, 'health_check\n'), 'Draining\n')

    monitor.resume()
    const drained = monitor.drain()
    const expectDrainingAfter = async (ms: number) => {
      assert.ok(await isPendingFor(100, drained)) // it looks several times in that
      clock.now += ms
      assert.ok(await isPendingFor(100, drained))
    }
    await expectDrainingAfter(200)
    await finishRequest()
    for (let request = 0; request < 3; request++) {
      await getPage(instancePort, '/')
      await expectDrainingAfter(99)
    }
    clock.now += 1
    await inTime(drained, 'it is drained')

    monitor.resume()
    const second = await drainByLine(t, port)
    for (let request = 0; request < 30; request++) {
      await getPage(instancePort, '/')
      clock.now += 90 // in sum longer than a shutdown would wait
      await pause(20)
    }
    await until(() => second.transcript.includes('requests keep coming'), 'it says so')
    assert.equal(second.isClosed, false)
    assert.doesNotMatch(second.transcript, /Drained/)

    // While the clock stands still, there is no quiet by which a drain might end.
    for (const end of [monitor.resume, () => void monitor.stop()]) {
      await askTimes(3, port, 'health_check\n')
      const both = Promise.all([monitor.drain(), monitor.drain({ reason: 'Again' })])
      assert.equal((await monitor.health()).reason, 'Again')
      end()
      await inTime(both, 'drain() ends')
      assert.notEqual((await monitor.health()).reason, 'Again')
    }
  })

  test('drain() waits for nobody where nobody asked, nor for requests it cannot see, but for minimumMs', async (t) => {
    const monitor = await importMonitor(t)
    const { server, held, letGo } = await serveHeld(t)
    hide(server)
    const atOnce = monitor.drain().then(() => 'at once')
    const later = nextTurn('later')
    assert.equal(await Promise.race([atOnce, later]), 'at once', 'without a running monitor')
    assert.equal((await monitor.health()).reason, 'Instance is booting')
    await monitor.start({ port: portOf(server), listen: LOOPBACK, logger: recorder() })
    const answer = getPage(portOf(server), '/held')
    await until(() => held.length === 1, 'a request is in flight')
    await inTime(monitor.drain(), 'it is drained without a server', 10_000) // not after 25 s
    assert.ok((await timeOf(monitor.drain({ minimumMs: 500 }))) >= 490)
    letGo()
    await answer
  })
})

// --- Shutdown ------------------------------------------------------------------------------------

describeInProcess('Shutdown', TOGETHER, () => {
  test('shutdown() called twice is one shutdown, which aborts a warm-up that asks the instance itself, and start() works again after it', async (t) => {
    const { server, held } = await serveHeld(t)
    const hangs: WarmupPerformer = async ({ url, signal }) => {
      await fetch(new URL('/held', url), { signal })
    }
    const setup = { server, performers: { '/': hangs }, until: 'started' } as const
    const { monitor, port } = await bootInstance(t, setup)
    await until(() => held.length === 1, 'the warm-up asks')
    const verdicts: string[] = []
    const cleanUp = async () => {
      await pause(700)
      verdicts.push(await ask(port, 'health_check\n').catch(codeOf))
    }
    const first = monitor.shutdown({ cleanUp })
    await inTime(monitor.shutdown({ cleanUp }), 'the second is over', 10_000) // not after 25 s
    assert.deepEqual(verdicts, ['Draining\n'])
    await inTime(first, 'the first is over')
    await monitor.shutdown({ cleanUp })
    assert.equal(server.listening, false)

    await bootInstance(t, { monitor, performers: WARM })
    await monitor.shutdown({ cleanUp })
    assert.deepEqual(verdicts, ['Draining\n', 'ECONNREFUSED']) // its port is another one
  })

  test(
    'shutdown() closes https and http2 servers, whatever state their connections are in, and before cleanUp the application hears that a request was cut',
    needs('openssl'),
    async (t) => {
      const { key, cert } = certify(t, 'localhost')
      const servers: Record<string, WebServer> = {
        https: https.createServer({ key, cert }),
        http2: http2.createServer(),
        https2: http2.createSecureServer({ key, cert, allowHTTP1: true })
      }
      const closeAll = async ([name, server]: [string, WebServer]) => {
        const events: string[] = []
        server.on('request', (_: unknown, response: EventEmitter) => {
          response.on('close', () => events.push('cut'))
          events.push('begun')
        })
        await startListening(t, server)
        const setup = { server, performers: WARM, until: 'started' } as const
        const { monitor, instancePort } = await bootInstance(t, setup)
        const silent = await converse(t, instancePort, { allowHalfOpen: true })
        const to = { host: '127.0.0.1', port: instancePort, rejectUnauthorized: false }
        if (name !== 'http2') {
          https.get(to).on('error', () => {})
        } else {
          const stubborn = await converse(t, instancePort, { allowHalfOpen: true })
          stubborn.socket.write('PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0')
          await until(() => stubborn.transcript !== '', 'the HTTP/2 session is open')
          stubborn.socket.removeAllListeners('end') // so that it never ends its side
          void askStream(await connectSession(t, instancePort))
        }
        await until(() => events.length === 1, 'a request is in flight')
        const closed = once(server, 'close')
        const cleanUp = async () => {
          events.push('cleaned up')
          await promisify(server.close.bind(server))().catch(() => {})
        }
        await monitor.shutdown({ timeoutMs: 500, cleanUp })
        assert.deepEqual(events, ['begun', 'cut', 'cleaned up'], name)
        await inTime(closed, `${name} is closed`)
        const isOver = () => silent.isClosed || silent.socket.readableEnded
        await until(isOver, 'the silent one is closed')
      }
      await Promise.all(Object.entries(servers).map(closeAll))
    }
  )

  test('an answer that is read slowly comes whole, and the kernel is told to accept no more before the server closes', async (t) => {
    const body = 'x'.repeat(30 * 2 ** 20)
    const server = await serve(t, (_, response) => response.end(body))
    const { monitor, instancePort } = await bootInstance(t, { server, performers: WARM })
    const { _handle: handle } = server as unknown as {
      _handle: { listen(backlog: number): number }
    }
    const backlogs = t.mock.method(handle, 'listen').mock
    const socket = connectTo(instancePort, {})
    socket.write(headOf('/', 'Connection: close'))
    await once(socket, 'readable') // and reads no more for a while
    const ended = monitor.shutdown()
    await pause(700)
    const answer = await readAll(socket)
    assert.equal(answer.length - answer.indexOf('\r\n\r\n') - 4, body.length)
    await inTime(ended, 'the shutdown is over')
    assert.deepEqual(backlogs.calls[0]?.arguments, [0])
  })

  test('an idle session is told once to leave before it is closed', needs('openssl'), async (t) => {
    const answer = (_: unknown, response: http2.Http2ServerResponse) => response.end('served')
    const servers = {
      http: http2.createServer(answer),
      https: http2.createSecureServer(certify(t, 'localhost'), answer)
    }
    for (const [scheme, server] of Object.entries(servers)) {
      await startListening(t, server)
      const { monitor } = await bootInstance(t, { server, performers: WARM })
      const session = await connectSession(t, portOf(server), scheme)
      assert.ok(session)
      assert.equal(await askStream(session), 'served')
      const told: number[] = []
      session.on('goaway', (_code, lastStream) => told.push(lastStream))
      const closed = once(session, 'close')
      await inTime(monitor.shutdown(), 'the shutdown is over')
      await inTime(closed, 'the session is closed')
      assert.equal(told[0], ALL_STREAMS) // so it may still open streams
      assert.equal(told.filter((lastStream) => lastStream === ALL_STREAMS).length, 1)
    }
  })

  test('a TLS connection from before start() is left to cleanUp', needs('openssl'), async (t) => {
    const server = https.createServer(certify(t, 'localhost'))
    const upgraded = takeUpgradesBare(server)
    await startListening(t, server)
    const port = portOf(server)
    const socket = tls.connect({ port, host: '127.0.0.1', rejectUnauthorized: false })
    const peer = await upgradeTo(port, socket)
    t.after(() => peer.socket.destroy())
    const { monitor } = await bootInstance(t, { server, performers: WARM, until: 'started' })
    const cleanUp = () => void upgraded[0]?.write('goodbye')
    await monitor.shutdown({ timeoutMs: 500, cleanUp })
    await until(() => peer.endedAt > 0, 'the client has seen the end')
    assert.equal(peer.text, 'goodbye')
  })

  test('upgraded connections are ended a second after cleanUp began, and destroyed a second later, whatever cleanUp does', async (t) => {
    const server = await serve(t)
    const upgraded = takeUpgradesBare(server)
    const { monitor, instancePort } = await bootInstance(t, { server, performers: WARM })
    const peer = await upgradeTo(instancePort)
    t.after(() => peer.socket.destroy())
    let cleanedAt = 0
    let closedAfterMs = 0
    const cleanUp = async () => {
      cleanedAt = performance.now()
      upgraded[0]?.write('goodbye')
      const closed = once(upgraded[0]!, 'close')
      closedAfterMs = await timeOf(inTime(closed, 'it is closed while cleanUp waits'))
    }
    await monitor.shutdown({ cleanUp })
    await until(() => peer.endedAt > 0, 'the client has seen the end')
    const endedAfterMs = peer.endedAt - cleanedAt
    assert.equal(peer.text, 'goodbye')
    assert.ok(endedAfterMs > 990, `ended after ${endedAfterMs} ms`)
    assert.ok(closedAfterMs > 1_990, `closed after ${closedAfterMs} ms`)
    assert.ok(endedAfterMs < closedAfterMs - 500, `${endedAfterMs} ms, ${closedAfterMs} ms`)
  })

  test('a shutdown names the probers that ask too rarely to be told in time, and says when it has not told all', async (t) => {
    const tooRarely =
      /^info ftw-monitor 127\.0\.0\.1 asks every \d\.\d s: too rarely to be told in time$/
    const late =
      /^warn ftw-monitor Not drained after 1\.6 s: 0 of 1 probers know, 0 requests in flight$/
    const shutDown = async (timeoutMs: number, expected: RegExp) => {
      const { monitor, port, logger } = await bootInstance(t, { performers: WARM })
      for (const ms of [0, 600, 600]) {
        await pause(ms)
        await ask(port, 'health_check\n')
      }
      await monitor.shutdown({ timeoutMs })
      const told = logger.lines.filter((line) => tooRarely.test(line) || late.test(line))
      assert.equal(told.length, 1, logger.lines.join('\n'))
      assert.match(told[0] ?? '', expected)
    }
    await Promise.all([shutDown(500, tooRarely), shutDown(2_000, late)])
  })

  test('a WebSocket over HTTP/2 is a request in flight until it is answered, and then has its goodbye', async (t) => {
    const server = http2.createServer({ settings: { enableConnectProtocol: true } })
    const asked = once(server, 'stream')
    await startListening(t, server)
    const { monitor, instancePort } = await bootInstance(t, { server, performers: WARM })
    const session = (await connectSession(t, instancePort))!
    if (!session.remoteSettings.enableConnectProtocol) await once(session, 'remoteSettings')
    const head = { ':method': 'CONNECT', ':protocol': 'websocket', ':path': '/' }
    const answer = readAll(session.request(head))
    const [stream] = (await inTime(asked, 'it is asked for')) as [http2.ServerHttp2Stream]
    assert.equal((await monitor.status()).requestsInFlight, 1)
    const cleaned = latch()
    const cleanUp = () => {
      cleaned.open()
      stream.write('goodbye')
    }
    const ended = monitor.shutdown({ cleanUp })
    await until(() => isRefused(instancePort), 'it accepts no more')
    assert.equal(await isPendingFor(300, cleaned.opened), true)
    stream.respond({ ':status': 200 })
    const { requestsInFlight, upgradedConnections } = await monitor.status()
    assert.deepEqual([requestsInFlight, upgradedConnections], [0, 1])
    assert.equal(await inTime(answer, 'it hears the goodbye', 10_000), 'goodbye')
    await inTime(ended, 'the shutdown is over', 10_000) // not after 25 s
  })
})

describeInProcess('Shutdown', ALONE, () => {
  test('wrong options of a shutdown are refused, and change nothing', async (t) => {
    const { monitor, server, port } = await bootInstance(t)
    const before = listenersOf(process)
    const wrongValues: Record<string, unknown[]> = {
      cleanUp: ['close'],
      cleanup: [() => {}],
      onSignal: ['exit'],
      reason: [''],
      fall: [0],
      minimumMs: [-1, NaN, '1500', null],
      timeoutMs: [-1, Infinity, '5000'],
      exitAfterMs: [25_000, NaN, '30000', 2 ** 31]
    }
    const expectRefused = async (options: unknown, Kind: typeof TypeError) => {
      const what = JSON.stringify(options)
      const isKind = (error: unknown) =>
        error instanceof Kind && error.message.startsWith('ftw-monitor: ')
      assert.throws(() => monitor.shutdownOnSignal(options as {}), isKind, what)
      await assert.rejects(monitor.shutdown(options as {}), isKind, what)
    }
    for (const options of [null, 7, () => {}]) await expectRefused(options, TypeError)
    await expectRefused({ timeoutMs: 5_000, exitAfterMs: 5_000 }, RangeError)
    for (const [name, values] of Object.entries(wrongValues)) {
      for (const value of values) {
        await expectRefused({ [name]: value }, typeof value === 'number' ? RangeError : TypeError)
      }
    }
    await assert.rejects(monitor.drain({ minimumMs: -1 }), /minimumMs must/)
    const wrongNames = ['SIGKILL', 'SIGSTOP', 'SIGTREM', 'TERM', 15]
    const wrongSignals = [[], 'SIGTERM', null, ...wrongNames.map((name) => [name])]
    for (const signals of wrongSignals) {
      const options = { signals } as ShutdownOptions
      assert.throws(() => monitor.shutdownOnSignal(options), TypeError, String(signals))
    }
    assert.deepEqual(listenersOf(process), before)
    assert.equal(server.listening, true)
    assert.equal(await ask(port, 'health_check\n'), 'OK\n')
  })

  test('shutdown() closes each connection as soon as no request is in flight on it, and half a head is one', async (t) => {
    setEnvironment(t, { FTW_MONITOR: '0' }) // without it, drain waits for the requests first
    const { server, held } = await serveHeld(t)
    server.keepAliveTimeout = 60_000
    const monitor = await importMonitor(t)
    assert.equal(await monitor.start(server), false)
    const open = () => converse(t, portOf(server))
    const never = await open()
    const first = await open()
    const [later, idle, soonIdle] = await Promise.all([open(), open(), open()])
    for (const peer of [idle, later]) {
      peer.say(headOf('/'))
      await until(() => peer.transcript.endsWith('served'), 'it is served')
      peer.transcript = ''
    }
    const head = headOf('/whole')
    for (const peer of [first, later]) peer.say(head.slice(0, 20))
    soonIdle.say(headOf('/held'))
    await until(() => held.length === 1, 'a request is in flight')
    held[0]?.write('begun') // so that its head has no `close`
    await until(() => /begun/.test(soonIdle.transcript), 'its head is sent')

    const ended = monitor.shutdown()
    await until(() => idle.isClosed, 'the idle one is closed at once')
    assert.equal(soonIdle.isClosed, false)
    held[0]?.end('first')
    await until(() => soonIdle.isClosed, 'the one that became idle later is closed')
    assert.match(soonIdle.transcript, /first/)

    await pause(500) // slow clients
    for (const peer of [first, later]) peer.say(head.slice(20))
    await inTime(ended, 'the shutdown is over', 4_000) // not after 25 s
    await until(() => [never, first, later].every(({ isClosed }) => isClosed), 'all are closed')
    for (const { transcript } of [first, later]) {
      assert.match(transcript, /^HTTP\/1\.1 200 OK\r\n[^]*served$/)
    }
  })

  test('half a head is waited for until five seconds after its last byte', SLOW, async (t) => {
    const { monitor, instancePort } = await bootInstance(t, { performers: WARM })
    const peer = await converse(t, instancePort)
    peer.say('GET / HT')
    await getPage(instancePort, '/') // by then it has come
    const ended = timeOf(monitor.shutdown())
    await pause(1_000) // a slow client
    peer.say('TP/1.1')
    const ms = await ended
    assert.ok(ms > 6_900 && ms < 12_000, `${ms} ms`) // a second later it is taken for quiet
    assert.equal(peer.transcript, '')
    assert.ok(peer.isClosed)
  })

  test('FTW_MONITOR_MINIMUM_MS holds, an option goes before FTW_MONITOR_TIMEOUT_MS, and half a head is cut like a request, as the log says', async (t) => {
    setEnvironment(t, { FTW_MONITOR_TIMEOUT_MS: '60000', FTW_MONITOR_MINIMUM_MS: '1000' })
    const { monitor, logger, instancePort } = await bootInstance(t, { performers: WARM })
    const peer = await converse(t, instancePort)
    peer.say('GET / HT')
    await getPage(instancePort, '/') // by then it has come
    const ended = monitor.shutdown({ timeoutMs: 1_500 })
    const ms = await timeOf(until(() => isRefused(instancePort), 'the server is closed'))
    assert.ok(ms > 990, `closed after ${ms} ms`)
    await ended
    await until(() => peer.isClosed, 'it is cut')
    const cut = 'warn ftw-monitor cuts 1 request that is still in flight after 1.5 s'
    assert.deepEqual(warningsOf(logger), [cut])
  })

  test('shutdown() does one thing after the other, and meanwhile nobody resumes, drains or starts, and stop() costs no request, no time and no listener of a signal', async (t) => {
    const before = process.listenerCount('SIGTERM')
    const agent = new http.Agent({ keepAlive: true })
    t.after(() => agent.destroy())
    const instance = await bootWithRequest(t, { agent })
    const { monitor, server, port, instancePort, logger } = instance

    const events: string[] = []
    monitor.shutdownOnSignal({
      onSignal: ({ signal }) => {
        monitor.resume()
        events.push(`onSignal ${signal}, listening ${server.listening}`)
      },
      cleanUp: ({ signal }) => void events.push(`cleanUp ${signal}, listening ${server.listening}`)
    })
    const ended = monitor.shutdown({ reason: 'Restarts' })
    const drained = monitor.drain({ reason: 'Drained by hand', minimumMs: 60_000 })
    assert.deepEqual(events, ['onSignal undefined, listening true'])
    assert.equal((await getPage(instancePort, '/')).body, 'served')
    const refusal = 'Error: not resumed, since the instance is shutting down\n'
    assert.equal(await ask(port, 'resume\n'), refusal)
    assert.equal(await ask(port, 'health_check\n'), 'Restarts\n')
    await monitor.stop()
    assert.equal(process.listenerCount('SIGTERM'), before + 1)
    assert.equal(await monitor.start({ server, listen: LOOPBACK }), false)
    await until(() => isRefused(instancePort), 'the server is closed')
    void monitor.stop()
    await pause(100)
    assert.equal(events.length, 1)

    const { body, headers } = await instance.finishRequest()
    assert.deepEqual([body, headers.connection], ['late', 'close'])
    await inTime(Promise.all([ended, drained]), 'the shutdown is over', 10_000)
    assert.deepEqual(events.slice(1), ['cleanUp undefined, listening true'])
    assert.ok(await isRefused(port))
    assert.deepEqual(warningsOf(logger), [
      'warn ftw-monitor does not resume: the instance is shutting down',
      'warn ftw-monitor does not start: the instance is shutting down'
    ])
    assert.equal(process.listenerCount('SIGTERM'), before + 1)
  })

  test('a shutdown that its own onSignal and cleanUp await is over after five seconds more, or half of what is left until exitAfterMs, with one warning', async (t) => {
    const clock = fakeClock(t)
    const timers = takeTimers(t, ['setTimeout'], clock)
    const exit = t.mock.method(process, 'exit', (() => {}) as typeof process.exit)
    const rows: [limits: ShutdownOptions, atMostMs: number][] = [
      [{}, 10_000],
      [{ timeoutMs: 1_000, exitAfterMs: 4_000 }, 3_500]
    ]
    for (const [limits, atMostMs] of rows) {
      const { monitor, logger } = await bootInstance(t, { performers: WARM, until: 'started' })
      const events: string[] = []
      const awaitShutdown = (name: string) => async () => {
        await nextTurn()
        await monitor.shutdown()
        events.push(name)
      }
      const beganAt = clock.now
      const callbacks = { onSignal: awaitShutdown('onSignal'), cleanUp: awaitShutdown('cleanUp') }
      void monitor.shutdown({ ...limits, ...callbacks }).then(() => events.push('all'))
      const isOver = async () => {
        timers.pass(100)
        await nextTurn()
        return events.includes('all')
      }
      await until(isOver, 'the shutdown is over')
      assert.deepEqual(events, ['onSignal', 'cleanUp', 'all'])
      assert.ok(clock.now - beganAt < atMostMs, `${clock.now - beganAt} ms`)
      assert.match(warningsOf(logger).join(), /^warn ftw-monitor resolves shutdown\(\) before/)
    }
    assert.equal(exit.mock.callCount(), 0)
  })

  test('a connection that came just before the end has a second for its first request', async (t) => {
    const { monitor, instancePort } = await bootInstance(t, { performers: WARM })
    const clock = fakeClock(t)
    const cameAt = clock.now
    const peer = await converse(t, instancePort)
    const ended = monitor.shutdown()
    await until(() => {
      clock.now = Math.min(clock.now + 10, cameAt + 500)
      return isRefused(instancePort)
    }, 'no connection is accepted any more')
    clock.now = cameAt + 900
    await pause(100) // by then idle connections are closed
    peer.say(headOf('/'))
    await until(() => peer.transcript.endsWith('hello'), 'it is served')
    clock.now += 10_000
    await ended
  })

  test('the log names once what a shutdown waits for, without queries, and three requests at most, and then what it cuts', async (t) => {
    const asked: unknown[] = []
    const handler: http.RequestListener = ({ url }) => asked.push(url)
    const { monitor, instancePort, logger } = await bootInstance(t, { performers: WARM, handler })
    const pages: Promise<void>[] = []
    for (const path of ['/a?token=secret', '/b%0a', '/a', '/c', '/d']) {
      pages.push(assert.rejects(getPage(instancePort, path)))
      await until(() => asked.length === pages.length, `it has got ${path}`)
    }
    const clock = fakeClock(t)
    const beganAt = clock.now
    const ended = monitor.shutdown()
    const isTold = () => {
      clock.now += 100
      return logger.lines.some((line) => line.includes(' waits '))
    }
    await until(isTold, 'the log names them')
    const afterMs = clock.now - beganAt
    assert.ok(afterMs >= 3_000 && afterMs < 25_000, `after ${afterMs} ms`)
    clock.now = beganAt + 24_000
    await pause(300) // it may look once more
    clock.now = beganAt + 25_000
    await Promise.all(pages)
    clock.now += 10_000
    await ended
    const names = 'GET /a, GET /b%0a, GET /c, 2 others'
    const told = logger.lines.filter((line) => / (waits|cuts) /.test(line))
    assert.deepEqual(told, [
      `info ftw-monitor waits for 5 requests: ${names}`,
      `warn ftw-monitor cuts 5 requests that are still in flight after 25 s: ${names}`
    ])
  })

  test('at exitAfterMs those parts of a shutdown are named that are not done, and no others', async (t) => {
    const exit = t.mock.method(process, 'exit', (() => {}) as typeof process.exit)
    const { monitor, logger } = await bootInstance(t, { performers: WARM, until: 'started' })
    const gate = latch()
    const untilOpen = () => gate.opened
    const limits = { timeoutMs: 100, exitAfterMs: 2_000 }
    const ended = monitor.shutdown({ ...limits, onSignal: untilOpen, cleanUp: untilOpen })
    await until(() => exit.mock.callCount() > 0, 'it exits')
    assert.deepEqual(exit.mock.calls[0]?.arguments, [1])
    const line = 'error ftw-monitor exits after 2 s; onSignal, cleanUp did not finish'
    assert.deepEqual(errorsOf(logger), [line])
    gate.open()
    await inTime(ended, 'the shutdown is over')
  })
})

describeProcesses('Shutdown', SIDE_BY_SIDE, () => {
  test('a cleanUp and an onSignal that fail, as methods of a class, are logged, and make the status 1', async (t) => {
    const script = `
      class Service {
        #failure = 'broken'
        onSignal() { throw new Error(this.#failure) }
        async cleanUp() { await pause(20); throw new Error(this.#failure + ', too') }
      }
      options = new Service()`
    const service = await bootService(t, { script })
    const { status, output } = await service.endWhileServing(service.instancePort, '/slow500')
    assert.equal(status, 1, output)
    assert.deepEqual(linesOfShutdown(output), [
      'ftw-monitor failed to shut down: onSignal: broken',
      'ftw-monitor failed to shut down: cleanUp: broken, too'
    ])
    assert.match(output, /: broken\n +at /)
    assert.match(output, /: broken, too\n +at /)
  })

  test('requests on connections that came while the event loop was blocked are served, not reset, and so is one on an idle connection', async (t) => {
    const isOver = ({ isClosed, transcript }: Peer) => isClosed || transcript.endsWith('served')
    for (const isIdleBefore of [false, true]) {
      const file = join(scratchFolder(t), 'sent')
      // It blocks until there is a file, which tells that all has been sent.
      const script = `
        const { existsSync } = await import('node:fs')
        options.onSignal = async () => {
          await pause(60)
          print('blocks')
          const startedAtMs = performance.now() // in half a second all else is due
          const isSent = () => existsSync(${JSON.stringify(file)})
          const isWaiting = (ms) => ms < 500 || (ms < 10_000 && !isSent())
          while (isWaiting(performance.now() - startedAtMs));
        }`
      const service = await bootService(t, { script })
      const connect = () => converse(t, service.instancePort)
      const peers: Peer[] = []
      if (isIdleBefore) {
        const peer = await connect() // alone: another request would put the end off
        peer.say(headOf('/first'))
        await until(() => peer.transcript.endsWith('served'), 'the first is served')
        peer.transcript = ''
        peers.push(peer)
      }
      service.kill('SIGTERM')
      await service.hasSaid('blocks')
      const count = isIdleBefore ? 1 : 5
      while (peers.length < count) peers.push(await connect())
      const post = headOf('/', 'Content-Length: 3').replace('GET', 'POST')
      for (const peer of peers) peer.say(`${post}a=1`)
      fs.writeFileSync(file, '')
      await until(() => peers.every(isOver), 'all are over')
      const served = /^HTTP\/1\.1 200 OK\r\n[^]*served$/
      for (const { transcript } of peers) assert.match(transcript, served)
      assert.equal((await service.awaitEnd()).status, 0)
    }
  })

  test('no stream of many connections is lost by a SIGTERM', async (t) => {
    const script = `
      const answer = (response) => setTimeout(() => response.end('served'), 30)
      server = http2.createServer((request, response) => answer(response))
      ${TELLS_OF_SIGNAL}`
    const service = await bootService(t, { script })
    const count = IS_SLOW_WANTED ? 100 : 14
    const connectOnce = () => connectSession(t, service.instancePort)
    const sessions = await Promise.all(Array.from({ length: 3 * count }, connectOnce))

    /** Thirty streams of a session; those that it takes no more go to new ones. */
    const askStreams = async (first: (typeof sessions)[number]) => {
      const outcomes: string[] = []
      let session = first
      while (outcomes.length < 30) {
        const askOne = () => (session ? askStream(session) : Promise.resolve('refused'))
        const asked = Array.from({ length: 30 - outcomes.length }, askOne)
        const answers = await Promise.all(asked)
        outcomes.push(...answers.filter((outcome) => outcome !== 'elsewhere'))
        if (outcomes.length < 30) session = await connectOnce()
      }
      return outcomes
    }
    const asked = sessions.splice(0, count).map(askStreams)
    await pause(10)
    service.kill('SIGTERM')
    asked.push(...sessions.splice(0, count).map(askStreams))
    await service.hasSaid('told SIGTERM')
    asked.push(...sessions.map(askStreams))
    const outcomes = await inTime(Promise.all(asked), 'all streams are over', 30_000)
    const lost = outcomes.flat().filter((outcome) => !/^(served|refused)$/.test(outcome))
    assert.deepEqual(lost, [])
    const { status, output } = await service.awaitEnd()
    assert.deepEqual([status, linesOfShutdown(output)], [0, []])
  })
})

// A neighbour that stands still, as for a certificate, would make a pause in the traffic.
describeProcesses('Shutdown', ALONE, () => {
  for (const [what, isProbed] of Object.entries({
    'with nobody to tell, traffic without a pause delays the end by two seconds': false,
    'where a prober was told, traffic without a pause delays the end until the time for telling is over': true
  })) {
    test(`${what}, and every request finishes`, isProbed ? SLOW : {}, async (t) => {
      // At random, else a busy machine would have the clients come all at once, with pauses between.
      const handler =
        '(_, response) => setTimeout(() => response.end("served"), 400 * Math.random())'
      const limit = isProbed ? 'options.timeoutMs = 5_000' : ''
      const service = await bootService(t, { script: `handle = ${handler}; ${limit}` })
      if (isProbed) await probe(t, service.port)
      const { load, done } = loadUntilRefused(t, service.instancePort, '/', 20)
      await until(() => load.served > 10, 'the load runs')
      const signalledAt = performance.now()
      const { status, output } = await service.end()
      await inTime(done, 'the load is over')
      assert.deepEqual([load.failures, load.served], [[], load.sent])
      assert.deepEqual([status, linesOfShutdown(output)], [0, []])
      const openMs = load.refusedAt - signalledAt
      if (isProbed)
        assert.ok(openMs > 3_500, `closed after ${openMs} ms`) // 4/5 of timeoutMs
      else assert.ok(openMs < 10_000, `closed after ${openMs} ms`) // not after 25 s
    })
  }
})

// --- Signals -------------------------------------------------------------------------------------

const hear = (name: string) =>
  `(...args) => print('heard', '${name}', ...args, isOpen ? 'early' : 'late')`
const heardIn = (output: string) => output.match(/(?<=^heard ).*/gm) ?? []

describeInProcess('Signals', ALONE, () => {
  test('shutdownOnSignal() listens once, however often it is called, until stop(), which gives the listeners of others back as they were, also where the monitor gives up, and shutdown() takes the options that it lacks from the latest', async (t) => {
    const heard = () => {}
    const heardOnce = () => {}
    process.on('SIGTERM', heard).once('SIGTERM', heardOnce)
    t.after(() => process.off('SIGTERM', heard).off('SIGTERM', heardOnce))
    const rawBefore = process.rawListeners('SIGTERM')
    const before = listenersOf(process)
    const counts = () => {
      const all = ['SIGTERM', 'SIGINT', 'SIGUSR2']
      return all.map((name) => process.listenerCount(name) - (before[name] ?? 0))
    }
    setEnvironment(t, { PORT: 'abc' })
    const monitor = await importMonitor(t)
    monitor.shutdownOnSignal({ cleanUp: () => assert.fail('it was replaced') })
    assert.deepEqual(counts(), [1, 1, 0])
    assert.notEqual(process.rawListeners('SIGTERM')[0], rawBefore[0])
    assert.equal(await monitor.start({ logger: recorder() }), false)
    assert.deepEqual(counts(), [1, 1, 0])

    setEnvironment(t, {})
    await bootInstance(t, { monitor, until: 'started' })
    monitor.shutdownOnSignal()
    assert.deepEqual(counts(), [1, 1, 0])
    const events: string[] = []
    class Options {
      signals: NodeJS.Signals[] = ['SIGUSR2', 'SIGUSR2']
      exitAfterMs = 600 // less than the timeoutMs that is given to shutdown()
      timeoutMs = 300
      #name = 'its owner'
      onSignal() {
        events.push('not this one')
      }
      cleanUp({ signal }: { signal: NodeJS.Signals | undefined }) {
        events.push(`cleaned up for ${this.#name} after ${signal}`)
      }
    }
    monitor.shutdownOnSignal(new Options())
    assert.deepEqual(counts(), [0, 0, 1])
    assert.deepEqual(process.rawListeners('SIGTERM'), rawBefore)
    const mistyped: object = { cleanup: () => {} }
    await assert.rejects(monitor.shutdown(mistyped), /^TypeError: .*no option cleanup/)
    await monitor.shutdown({ timeoutMs: 1_200, onSignal: () => void events.push('this one') })
    assert.deepEqual(events, ['this one', 'cleaned up for its owner after undefined'])
    assert.deepEqual(counts(), [0, 0, 1])
    await monitor.stop()
    assert.deepEqual(counts(), [0, 0, 0])
    assert.deepEqual(listenersOf(process), before)
  })
})

describeProcesses('Signals', SIDE_BY_SIDE, () => {
  test('at SIGTERM or SIGINT a service serves what is in flight, cleans up, and ends with 0, with or without a monitor', async (t) => {
    const setups: Record<string, ProcessSetup> = {
      'a monitor': {},
      'a channel to the process that started it, as under PM2': {
        script: "process.on('message', () => {})",
        stdio: ['pipe', 'pipe', 'pipe', 'ipc']
      },
      'a monitor that is switched off': { env: { FTW_MONITOR: '0' } },
      'a monitor that cannot use FTW_MONITOR_LISTEN': {
        env: { FTW_MONITOR_LISTEN: 'nonsense' },
        script: 'begin = () => monitor.start(server)'
      },
      'no monitor': { script: 'begin = () => {}' }
    }
    const endOne = async ([what, setup]: [string, ProcessSetup], index: number) => {
      const { instancePort, endWhileServing } = await bootService(t, {
        ...setup,
        script: `
          ${setup.script ?? ''}
          ${TELLS_OF_SIGNAL}
          options.cleanUp = async ({ signal }) => {
            cleanUp()
            await pause(50)
            print('cleaned up after', signal)
          }`
      })
      const signal = index % 2 ? 'SIGINT' : 'SIGTERM'
      const { status, ms, output } = await endWhileServing(instancePort, '/slow500', { signal })
      assert.equal(status, 0, `${what}: ${output}`)
      assert.match(output, new RegExp(`\\ntold ${signal}\\n[^]*\\ncleaned up after ${signal}\\n`))
      assert.deepEqual(linesOfShutdown(output), [], what)
      assert.doesNotMatch(output, / again/, what)
      assert.ok(ms < 10_000, `${what}: ended after ${ms} ms`) // not after 25 s
    }
    await Promise.all(Object.entries(setups).map(endOne))
  })

  test(
    'what keeps a process alive is named a second after all is done, and does not keep it; only a listener of the signal has five seconds before',
    SLOW,
    async (t) => {
      const alive = 'setInterval(() => {}, 1_000)'
      const connected = `
        const other = net.createServer().listen(0, '127.0.0.1', () => {
          for (let count = 0; count < 2; count++) net.connect(other.address().port, '127.0.0.1')
        })
        process.exitCode = 7`
      const limits = 'options.timeoutMs = 500; options.exitAfterMs = 1_500'
      const listening = `${alive}; ${limits}; process.on('SIGTERM', ${hear('on')})`
      const setups: [script: string, named: string, status: number, atLeastMs: number][] = [
        [alive, '1 Timeout', 0, 990],
        [connected, '1 TCPServerWrap, 4 TCPSocketWrap', 7, 990],
        ['process.stdin.resume()', '\\d PipeWrap', 0, 990],
        [listening, '1 Timeout', 0, 4_900]
      ]
      const endOne = async ([script, named, expected, atLeastMs]: (typeof setups)[number]) => {
        const service = await bootService(t, { script })
        const { status, ms, output } = await service.end()
        const sentence = 'ftw-monitor is done, but something keeps the process alive'
        assert.match(output, new RegExp(`\\n${sentence}: ${named}; exits\\n$`))
        assert.equal(status, expected)
        const atMostMs = atLeastMs > 4_000 ? 15_000 : 4_900
        assert.ok(ms > atLeastMs && ms < atMostMs, `${ms} ms`)
        assert.deepEqual(heardIn(output), script === listening ? ['on SIGTERM 15 late'] : [])
      }
      await Promise.all(setups.map(endOne))
    }
  )

  test('a SIGINT that comes from no terminal waits for probers, and one that comes again changes nothing, and is logged once, though the program removes all listeners; whoever listens after that is told after us', async (t) => {
    const service = await bootService(t, {
      script: `
        options.signals = ['SIGTERM', 'SIGINT', 'SIGHUP', 'SIGTERM']
        process.on('SIGINT', () => print('heard one that was removed'))
        options.onSignal = ({ signal }) => {
          process.removeAllListeners(signal)
          process.on(signal, ${hear('on')})
          print('told', signal)
        }`
    })
    await probe(t, service.port, 250)
    const page = getPage(service.instancePort, '/slow2500')
    await service.hasSaid('asked for /slow2500')
    service.kill('SIGINT')
    await service.hasSaid('told SIGINT') // else the kernel might make one of two
    await pause(3)
    service.kill('SIGINT')
    await service.hasSaid('got SIGINT again; it is shutting down already')
    service.kill('SIGTERM')
    await pause(1_100)
    service.kill('SIGTERM')
    service.kill('SIGHUP')
    const { status, output } = await service.awaitEnd()
    assert.equal((await page).body, 'served')
    assert.equal(status, 0, output)
    const drains =
      /^ftw-monitor drains: waits for 127\.0\.0\.1 \(asks every 0\.\d s\), at most 20 s$/m
    assert.match(output, drains)
    assert.equal(output.match(/^told /gm)?.length, 1, output)
    assert.equal(output.match(/^ftw-monitor got \w+ again/gm)?.length, 1, output)
    assert.deepEqual(heardIn(output), ['on SIGINT 2 late'])
  })

  test('a SIGINT more than a second after a SIGTERM ends the process at once with 130, says so, and takes the file of a Unix socket along', async (t) => {
    const socketPath = join(scratchFolder(t), 'service.sock')
    const service = await bootService(t, {
      script: `${TELLS_OF_SIGNAL}; listen = () => server.listen(${JSON.stringify(socketPath)})`
    })
    const refused = assert.rejects(getPage(0, '/hang', { socketPath }))
    await service.hasSaid('asked for /hang')
    service.kill('SIGTERM')
    await service.hasSaid('shutdown: closing')
    await pause(1_100)
    service.kill('SIGINT')
    const { status, ms, output } = await service.awaitEnd()
    assert.equal(status, 130)
    assert.ok(ms < 10_000, `ended after ${ms} ms`) // not after 25 s
    assert.match(output, /^ftw-monitor .*\bgot SIGINT again; ends at once/m)
    assert.doesNotMatch(output, /cleaned up/)
    assert.equal(fs.existsSync(socketPath), false)
    await refused
  })

  test('ten listeners of a signal cost no warning of Node.js, and those that come and go leave nothing behind', async (t) => {
    const script = `
      for (let index = 0; index < 9; index++) process.on('SIGTERM', () => {})
      monitor.shutdownOnSignal()
      await pause(50)
      process.removeAllListeners('SIGTERM')
      const finalized = new FinalizationRegistry(() => { count++ })
      let count = 0
      for (let index = 0; index < 100; index++) {
        const listener = () => {}
        finalized.register(listener)
        process.once('SIGTERM', listener)
        await nextTurn()
        process.off('SIGTERM', listener)
      }
      for (let round = 0; round < 100 && count < 90; round++) {
        gc()
        await pause(20)
      }
      print('collected', count >= 90, process.listenerCount('SIGTERM'))
      process.exit()`
    const watched = runScript(t, { script, flags: ['--expose-gc'] })
    assert.equal(await watched.exit, 0, watched.output)
    assert.equal(watched.output, 'collected true 1\n')
  })

  test(
    'Ctrl-C in a terminal waits for no prober, requests still finish, and the log says that a second one ends it at once',
    needs('script'),
    async (t) => {
      const script = 'options.minimumMs = 15_000'
      const service = await bootService(t, { terminal: true, script })
      await probe(t, service.port)
      const page = getPage(service.instancePort, '/slow800')
      await service.hasSaid('asked for /slow800')
      service.watched.child.stdin?.write('\x03')
      await service.hasSaid('Ctrl-C again')
      await until(() => isRefused(service.instancePort), 'it accepts no more', 14_000)
      assert.equal((await page).body, 'served')
      const { status, output } = await service.awaitEnd()
      assert.equal(status, 0)
      assert.doesNotMatch(output, /waits for 127/)
    }
  )

  test('a signal of which shutdownOnSignal() knows nothing is heard at once; whoever listened for one of its own, and whoever listens after it, hears of that after cleaning, in order, as ever, also where the program itself emits it', async (t) => {
    const script = `
      process.on('SIGUSR2', (signal) => {
        print('heard', signal, isOpen ? 'early' : 'late')
        process.emit('SIGTERM', 'SIGTERM', 15)
      })
      process.on('uncaughtException', ({ message }) => print('heard', message))
      process.on('SIGTERM', () => { throw new Error('broken') })
      const before = ${hear('before')}
      process.on('SIGTERM', before)
      process.once('SIGTERM', before)
      const takenOff = ${hear('nothing')}
      process.on('SIGTERM', takenOff)
      options.onSignal = () => process.off('SIGTERM', takenOff)
      const beginBefore = begin
      begin = async () => {
        for (const method of ['on', 'addListener', 'once', 'prependListener', 'prependOnceListener']) {
          const hear = (...args) => print('heard', method, ...args, isOpen ? 'early' : 'late')
          process[method]('SIGTERM', hear)
        }
        return await beginBefore()
      }`
    const { instancePort, endWhileServing } = await bootService(t, { script })
    const ending = await endWhileServing(instancePort, '/slow300', { signal: 'SIGUSR2' })
    assert.deepEqual(heardIn(ending.output), [
      'SIGUSR2 early',
      'prependOnceListener SIGTERM 15 late',
      'prependListener SIGTERM 15 late',
      'broken',
      'before SIGTERM 15 late',
      'before SIGTERM 15 late',
      'on SIGTERM 15 late',
      'addListener SIGTERM 15 late',
      'once SIGTERM 15 late'
    ])
    assert.equal(ending.status, 0, ending.output)
  })

  test('a start() that comes after the signal, and one that waited for listen(), resolves to false', async (t) => {
    const script = `
      const report = async (name, started) => {
        print(name, await started, (await monitor.health()).healthy)
      }
      options.onSignal = () => report('during', begin())
      options.cleanUp = async () => {
        cleanUp()
        setTimeout(async () => {
          await listen()
          await report('after', begin())
        }, 50)
        setTimeout(() => {}, 700) // what boots keeps the process alive
      }
      monitor.shutdownOnSignal(options)
      setTimeout(() => print('never'), 20_000)
      void report('waited', begin())
      print('booting')`
    const service = startService(t, script)
    await service.hasSaid('booting')
    const { status, output } = await service.end()
    for (const name of ['waited', 'during', 'after']) {
      assert.match(output, new RegExp(`^${name} false false$`, 'm'))
    }
    assert.doesNotMatch(output, /up 100%/)
    assert.equal(status, 0, output)
  })
})

// --- The command table ---------------------------------------------------------------------------

describeInProcess('The command table', TOGETHER, () => {
  test('what a command answers decides what follows on its connection, but not over HTTP', async (t) => {
    const answerMode: Command = (connection, mode, when) => {
      connection.write(`${mode}.`)
      if (mode === 'fail') throw new RangeError('boom')
      const answer = (mode === 'nothing' ? undefined : mode) as 'quit' | undefined
      return when === 'later' ? pause(5, answer) : answer
    }
    const insist: Command = (connection, ...words) => {
      if (words[0] === 'fail') throw new Error('on purpose')
      connection.write(JSON.stringify(words))
      if (words[0] === 'end') return 'quit'
      return words[0] === 'leave' ? 'interactive' : 'more'
    }
    const { monitor, port } = await bootInstance(t)
    monitor.register('answer', '', answerMode, { http: true })
    monitor.register('insist', '', () => assert.fail('was replaced'))
    monitor.register('insist', '', insist)
    monitor.register('health_check', 'Mine', (connection) => connection.write('my own\n'))
    await assertReplies(port, {
      'answer nothing later\nquit\n': 'nothing.',
      'answer quit\nquit\n': 'quit.',
      'answer interactive\nquit\n': 'interactive.Goodbye.\n',
      'answer  interactive\tlater \n\nquit\n': 'interactive.interactive.Goodbye.\n',
      'interactive\nanswer nothing\nquit\n': `${INTERACTIVE}nothing.Goodbye.\n`,
      'interactive\nanswer quit later\nquit\n': `${INTERACTIVE}quit.`,
      'insist fail\nquit\n': 'Error: on purpose\n',
      'interactive\ninsist fail\nquit\n': `${INTERACTIVE}Error: on purpose\nGoodbye.\n`,
      'insist\n 2+2  or so\r\n\nfail\nquit\nend\nquit\n':
        '[]["2+2","or","so"][]Error: on purpose\n["quit"]["end"]',
      'insist a\nleave\nhealth_check\nquit\n': '["a"]["leave"]my own\nGoodbye.\n'
    })

    const paths = ['/answer/quit', '/answer/interactive', '/answer/more']
    const requests = paths.map((path) => headOf(path)).join('')
    const pages = await ask(port, requests + headOf('/answer/nothing', 'Connection: close'))
    assert.equal(pages.match(/HTTP\/1\.1 200 OK\r\n/g)?.length, 4)
    const bodies = pages.match(/(?<=\r\n\r\n)\w+\./g)
    assert.deepEqual(bodies, ['quit.', 'interactive.', 'more.', 'nothing.'])
    const { status, body } = await getPage(port, '/answer/fail')
    assert.deepEqual([status, body], [500, 'fail.RangeError: boom\n'])
  })

  test('a wrong name, documentation, command, collector or option is a TypeError', async (t) => {
    const monitor = await importMonitor(t)
    const expectTypeError = (register: Function, ...words: unknown[]) => {
      assert.throws(() => register(...words), TypeError, JSON.stringify(words))
    }
    const command = () => {}
    for (const name of ['', 'a b', 'a\n', '\t', undefined, 42]) {
      expectTypeError(monitor.register, name, 'doc', command)
    }
    expectTypeError(monitor.register, 'a', 42, command)
    for (const wrong of ['command', undefined]) expectTypeError(monitor.register, 'a', 'doc', wrong)
    const ofBoth = { http: true, local: true } // over HTTP nobody is sure to be local
    expectTypeError(monitor.register, 'a', 'doc', command, ofBoth)
    for (const wrong of [undefined, 'text', {}]) expectTypeError(monitor.registerMetrics, wrong)
    for (const optional of [1, 'yes', null]) {
      expectTypeError(monitor.registerDatabase, 'main', { isConnected: () => true, optional })
    }
  })

  test('a command that answers or fails after its connection is gone harms nobody', async (t) => {
    const { monitor, port } = await bootInstance(t, { performers: WARM })
    const resume: (() => void)[] = []
    const answerLate: Command = async (connection, outcome) => {
      await new Promise<void>((resolve) => resume.push(resolve))
      for (let each = 0; each < 100; each++) connection.write('x'.repeat(100_000))
      if (outcome === 'fails') throw new Error(`${connection.remoteAddress} ${connection.local}`)
      return outcome as 'quit'
    }
    monitor.register('late', '', answerLate, { http: true })
    for (const outcome of ['interactive', 'quit', 'more', 'fails']) {
      for (const text of [`late ${outcome}\n`, headOf(`/late/${outcome}`)]) {
        for (const end of ['resetAndDestroy', 'destroy', 'end'] as const) {
          const peer = await converse(t, port)
          peer.say(text)
          await until(() => resume.length > 0, 'it runs')
          peer.socket[end]()
          await untilSeen(port)
          resume.pop()!()
          await untilSeen(port)
          peer.socket.destroy()
        }
      }
    }
    assert.equal(await ask(port, 'health_check\n'), 'OK\n')
  })

  test('with local: socket what a forwarder on this machine brings is a stranger', async (t) => {
    const { monitor, port, instancePort } = await bootInstance(t, {
      databases: { main: { isConnected: () => Promise.reject(new Error('10.0.0.7 is down')) } },
      options: { listen: LOOPBACK, local: 'socket' },
      until: 'started'
    })
    monitor.register('own', 'Own', (connection) => connection.write('Done\n'), { local: true })
    for (const name of ['own', 'drain', 'resume', 'warmup']) {
      assert.equal(await ask(port, `${name}\n`), `${name} is for this machine only\n`)
    }
    assert.equal(await ask(port, 'health_check\n'), "Error: Database 'main' failed.\n")
    assert.doesNotMatch((await getPage(port, '/status')).body, /10\.0\.0\.7/)
    assert.equal((await getPage(instancePort, '/@@warmup')).status, 403)
    monitor.registerDatabase('main', { isConnected: () => true })
    await untilVerdict(monitor) // our own request for the view is ours all the same
    await assert.rejects(monitor.start({ local: 'port' } as never), /local must be 'socket'/)
  })
})

describeInProcess('The command table', ALONE, () => {
  test('whatever a command throws, rejects with or returns is a mode or one line; its stack goes to the logger alone, its text to this machine', async (t) => {
    const clock = fakeClock(t)
    const { monitor, port, logger } = await bootInstance(t, { performers: WARM })
    /** The line with which a command is refused, in each way of asking for it. */
    const refusalOf = async (command: () => unknown) => {
      monitor.register('odd', '', command as Command, { http: true })
      const reply = await ask(port, 'odd\n')
      assert.match(reply, /^(?!.*OK)\P{Cc}{1,500}\n$/u)
      assert.doesNotMatch(reply, /\.[tj]s|node:|[/\\]/)
      const { status, headers, body } = await getPage(port, '/odd')
      assert.deepEqual([status, body], [500, reply])
      assert.equal(headers['content-type'], 'text/plain; charset=utf-8')
      assert.equal(await ask(port, 'PROXY UNKNOWN\r\nodd\n'), 'Error: odd failed\n')
      return reply
    }
    const ownCause = new Error('fetch failed')
    ownCause.name = 'x'.repeat(1e6)
    ownCause.cause = ownCause
    const odd = { name: Symbol('name'), message: { toString: thrower }, stack: 7 }
    const replies: [error: unknown, text: string][] = [
      [new RangeError('boom x y'), 'RangeError: boom x y\n'],
      [new Error('two\nlines\r\nand\0more'), 'Error: two lines  and more\n'],
      [new TypeError(''), 'TypeError: '],
      ['no error at all', 'Error: no error at all\n'],
      [undefined, ''],
      [Symbol('boom'), ''],
      [Object.create(null), ''],
      [trapped(['stack', 'name', 'message', 'cause', 'code', 'then', 'toString']), ''],
      [new Proxy({}, TRAPS), ''],
      [trapped(['name'], new Error('boom')), ''],
      [trapped(['stack'], new Error('boom')), ''],
      [Object.assign(new Error(), odd), ''],
      [ownCause, '']
    ]
    for (const [error, text] of replies) {
      const fail = () => {
        throw error
      }
      for (const command of [fail, () => Promise.reject(error), () => nextTurn().then(fail)]) {
        const reply = await refusalOf(command)
        assert.ok(reply.includes(text), reply)
      }
    }
    assert.equal(errorsOf(logger).length, 3 * replies.length)
    assert.match(errorsOf(logger)[0] ?? '', /boom x y[^]*\n +at .*monitor\.test/)

    const shown = [42, 0, 42n, 'done', '', null, false, true, ['quit'], { mode: 'quit' }, [], {}]
    for (const value of [...shown, Symbol('x'), thrower]) {
      const advice = /^Error: odd returned .* instead of a mode; reply with connection\.write\n$/
      assert.match(await refusalOf(() => value), advice)
      assert.match(await refusalOf(() => Promise.resolve(value)), advice)
    }
    assert.match(await refusalOf(() => 42), /^Error: odd returned 42 instead/)
    const hardToShow: unknown[] = [
      'OK\nOK',
      Object.create(null),
      trapped(['then']),
      { then: thrower },
      new Proxy({}, TRAPS),
      { then: (resolve: Function) => resolve({ then: thrower }) },
      Promise.resolve(new Proxy({ then: undefined }, { getPrototypeOf: thrower }))
    ]
    for (const returned of hardToShow) await refusalOf(() => returned)

    // Each is logged at most once a second.
    for (const name of ['one', 'other']) monitor.register(name, '', thrower)
    const logged: number[] = []
    for (const ms of [0, 999, 1]) {
      logger.lines.length = 0
      clock.now += ms
      await ask(port, `interactive\n${'one\nother\n'.repeat(10)}quit\n`)
      logged.push(errorsOf(logger).length)
    }
    assert.deepEqual(logged, [2, 0, 2])
    assert.equal(await ask(port, 'health_check\n'), 'OK\n')
  })
})

// --- Commands ------------------------------------------------------------------------------------

describeInProcess('Commands', TOGETHER, () => {
  test('help lists every command with its summary, sorted by name, and tells all about each', async (t) => {
    const { monitor, port } = await bootInstance(t, { performers: WARM, until: 'started' })
    monitor.register('aardvark', 'Come first\n\n    In its words.\n', () => {})
    const lines = (await ask(port, 'help\n')).split('\n')
    assert.deepEqual([lines.shift(), lines.pop()], ['Supported commands:', ''])
    for (const line of lines) assert.match(line, /^ {2}\S+ -- \S/)
    assert.deepEqual(lines, lines.toSorted())
    assert.doesNotMatch(lines.join('\n'), /^ {2}(\/|readyz|livez)/m)
    const expected = [
      'aardvark -- Come first',
      'health_check -- Check whether the instance is alive and ready to serve requests.',
      'monitor -- Get general process info',
      'zeostatus -- Get ZEO client status information'
    ]
    for (const entry of expected) assert.ok(lines.includes(`  ${entry}`), entry)
    const help = 'Help for aardvark:\n\nCome first\n\n    In its words.\n\n'
    assert.equal(await ask(port, 'help aardvark\n'), help)
  })

  test('dbinfo, zeocache, zeostatus and perf_metrics answer what a database tells, and -1 for the rest', async (t) => {
    const { monitor, port } = await bootInstance(t, {
      databases: {
        bare: { isConnected: async () => true },
        partly: { isConnected: () => false, figures: () => ({ size: 5 }) },
        later: {
          isConnected: () => Promise.reject(new Error('no')),
          figures: async () => ({ nonGhost: 6, recordsEvicted: 7 }),
          connections: async () => []
        },
        broken: { isConnected: thrower }
      },
      until: 'started'
    })
    // Where none is named main, "-" and no name mean the one registered first.
    await assertReplies(port, { 'dbinfo -\n': '0 0 0 -1 -1\n', 'zeostatus\n': 'True\n' })
    const figures = {
      size: 3212,
      nonGhost: 1438,
      maxSize: 30000,
      accesses: 1000,
      bytesAdded: 4200,
      bytesEvicted: 2300,
      recordsAdded: 42,
      recordsEvicted: 23,
      conflicts: 7,
      unresolvedConflicts: 3,
      objects: 13336,
      bytes: 5796849.7
    }
    const main = { isConnected: () => true, figures: () => figures }
    const activity = monitor.registerDatabase('main', main)
    activity.loads(1114)
    activity.stores(28)
    for (let each = 0; each < 459; each++) activity.connections()
    await assertReplies(port, {
      'dbinfo\n': '1114 28 459 3212 1438\n',
      'dbinfo - 10\n': '1114 28 459 3212 1438\n',
      'dbinfo partly 0\n': '0 0 0 5 -1\n',
      'dbinfo later 3600\n': '0 0 0 -1 6\n',
      'zeocache\n': '42 4200 23 2300 1000\n',
      'zeocache later\n': '-1 -1 7 -1 -1\n',
      'zeostatus\n': 'True\n',
      'zeostatus partly\n': 'False\n',
      'zeostatus later\n': 'False\n',
      'zeostatus broken\n': 'False\n',
      'monitor 0 bare\n': /^-1\nVmRSS:/,
      'monitor 0 later\n': /^0\nVmRSS:/
    })
    const { cache, db } = await askPerfMetrics(port)
    assert.deepEqual(cache, { size: 3212, ngsize: 1438, max_size: 30000 })
    assert.deepEqual(Object.values(db), [1114, 28, 459, 7, 3, 13336, 5796849])
  })

  test("the asker's own mistakes are answered by one line that says so, and not logged", async (t) => {
    const { monitor, port, logger } = await bootInstance(t, { performers: WARM })
    const before = logger.lines.length
    for (const command of ['dbinfo', 'zeocache', 'zeostatus', 'dbinfo -', 'monitor 0 -']) {
      assert.equal(await ask(port, `${command}\n`), "Error: no database 'main' is registered\n")
    }
    monitor.registerDatabase('main', { isConnected: () => true })
    const isUnknown = "Error: no database 'nope' is registered\n"
    for (const command of ['dbinfo', 'zeocache', 'zeostatus', 'monitor 0', 'perf_metrics']) {
      assert.equal(await ask(port, `${command} nope\n`), isUnknown)
    }
    for (const seconds of ['x', '-1', '3601', '3600.5', 'NaN', 'Infinity', '1e9', '0x10', '1,5']) {
      for (const command of ['dbinfo', 'perf_metrics']) {
        const reply = await ask(port, `${command} main ${seconds}\n`)
        assert.match(reply, /^Error: [^\n]*SECONDS[^\n]* 0 to 3600\n$/, `${command} ${seconds}`)
      }
    }
    await assertReplies(port, {
      'PROXY UNKNOWN\r\ndbinfo nope\n': isUnknown,
      'monitor young\n': /^Error: AGE [^\n]+\n$/,
      '\x1b[31m\n': /^Invalid command ' \[31m'\n/
    })
    assert.deepEqual(logger.lines.slice(before), [])
  })
})

// --- Figures, metrics and status -----------------------------------------------------------------

/** The cells of each row of the page, without their markup; `▢` stands for a bar, and a blank for one
 *  that does not break. */
function rowsOfPage(body: string): string[] {
  const rows = body.match(/^<tr.*$/gm) ?? []
  return rows.map((row) =>
    row
      .replace(/^<tr[^>]*><th scope="row">/, '')
      .replace(/<progress[^>]*><\/progress>/g, '▢')
      .replaceAll(/<td[^>]*>/g, '|')
      .replaceAll('\u00a0', ' ')
  )
}

describeInProcess('Figures, metrics and status', TOGETHER, () => {
  test('of an instance of which the port alone is known, what cannot be known is -1 or left out', async (t) => {
    const monitor = await importMonitor(t)
    monitor.registerWarmup('/', () => Promise.reject(new Error('no stock')))
    const instancePort = await freePort()
    const options = { port: instancePort, listen: LOOPBACK, logger: recorder() }
    const { port } = (await monitor.start(options)) as net.AddressInfo
    const url = `http://localhost:${instancePort}`
    const place = async () => /^instance +(.*), up /m.exec(await ask(port, 'status\n'))?.[1]
    assert.equal(await place(), `${url} (not listening)`)
    assert.equal((await askMetrics(port))['ftw_monitor_state{state="booting"}'], 1)

    await startListening(t, hide(http.createServer(hello)), { ...LOOPBACK, port: instancePort })
    await untilVerdict(monitor, 'Warmup failed: no stock')
    assert.equal(await place(), url)
    assert.equal((await askMetrics(port))['ftw_monitor_state{state="warmup_failed"}'], 1)
    const { cache, db, http: counts } = await askPerfMetrics(port)
    const figures = [cache, db, counts].flatMap((group) => Object.values(group))
    assert.deepEqual(new Set(figures), new Set([-1]))
    assert.doesNotMatch(await ask(port, 'metrics\n'), /ftw_monitor_http|ftw_monitor_database| -1$/m)
    assert.match(await ask(port, 'status\n'), /^last 30 s  longest lag [\d.]+ m?s$/m)
    assert.doesNotMatch((await openPage(port)).body, /requests? a second|class="requests"/)

    monitor.registerDatabase('main', { isConnected: () => Promise.reject(new Error('no route')) })
    const known = await monitor.status()
    const { seconds, nextTrySeconds } = known.warmup[0]!
    const unknown = { answeredMs: -1, pendingSeconds: -1 }
    const trouble = 'failed: no route'
    const expected = {
      healthy: false,
      reason: "Error: Database 'main' failed: no route",
      url,
      requestsInFlight: -1,
      upgradedConnections: -1,
      answers: -1,
      errors: -1,
      meanAnswerMs: -1,
      draining: undefined,
      warmup: [{ site: '/', status: 'failed', seconds, failure: 'no stock', nextTrySeconds }],
      databases: [{ name: 'main', optional: false, connected: false, trouble, ...unknown }]
    }
    assert.deepEqual({ ...known, ...expected }, known)
    assert.ok(known.uptimeSeconds > 0 && known.residentMemoryBytes > 1e6)
    void monitor.drain()
    assert.match(await ask(port, 'status\n'), /^draining   .*, 0 of 0 probers know$/m)
  })

  test('the text tells the verdict, and what it comes from, in a line for each, and metrics the times', async (t) => {
    const gate = latch()
    const { monitor, port, instancePort } = await bootInstance(t, {
      databases: {
        main: { isConnected: () => true },
        cache: { isConnected: () => false, optional: true },
        search: { isConnected: () => true }
      },
      performers: { '/': () => {}, '/shop': () => gate.opened, '/search': () => {} },
      until: 'started'
    })
    await untilVerdict(monitor, 'Warmup in progress')
    const nameOf = (site: string) => `ftw_monitor_warmup_seconds{site="${site}"}`
    const isLong = async () => (await askMetrics(port))[nameOf('/shop')]! > 0.1
    await until(isLong, '/shop has run for a while')
    const { [nameOf('/')]: first, [nameOf('/search')]: last } = await askMetrics(port)
    assert.ok(first! < 0.1 && last === undefined, `${first} ${last}`)
    await askTimes(3, port, 'health_check\n')
    const lines = (await ask(port, 'status\n')).split('\n')
    const url = `http://127\\.0\\.0\\.1:${instancePort}`
    const counts = '0 requests in flight, 0 upgraded(, loop \\d+ % busy)?, \\d+ MiB'
    const expected = [
      /^Warmup in progress$/,
      new RegExp(`^instance   ${url}, up \\d+ (s|min), ${counts}$`),
      /^last 30 s  longest lag [\d.]+ m?s, 0 answers$/,
      /^warm-up    \/           warm after \d+\.\d s$/,
      /^warm-up    \/shop       running for \d+\.\d s$/,
      /^warm-up    \/search     waiting$/,
      /^database   main        connected, answered in \d+ ms$/,
      /^database   cache       disconnected \(optional\)$/,
      /^database   search      connected, answered in \d+ ms$/,
      /^prober     127\.0\.0\.1   asked \d+\.\d s ago, every \d+\.\d s$/,
      /^draining   no$/,
      /^since      \d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ  red: Warmup in progress$/,
      /^since      \S+ \S+Z  red: Instance is booting$/,
      /^$/
    ]
    assert.equal(lines.length, expected.length, lines.join('\n'))
    for (const [index, line] of lines.entries()) assert.match(line, expected[index]!)
  })

  test("agent_check, in words that are not the operator's, /status, metrics and page tell each state; what is optional only warns", async (t) => {
    const gate = latch()
    let isConnected = true
    const { monitor, port, instancePort } = await bootInstance(t, {
      performers: { '/': () => gate.opened },
      databases: { main: { isConnected: () => isConnected } },
      until: 'started'
    })
    const told = async () => {
      const line = await ask(port, 'agent_check\n')
      const page = await getPage(port, '/agent_check')
      assert.equal(page.body.replace(/\d+%/, 'N%'), line.replace(/\d+%/, 'N%'))
      const { status, json } = await askHealthJson(port)
      assert.equal(status, page.status)
      const { state } = await monitor.status()
      const samples = await askMetrics(port)
      const states = Object.keys(samples).filter((name) => name.startsWith('ftw_monitor_state'))
      const current = states.filter((name) => samples[name] === 1)
      assert.deepEqual(current, [`ftw_monitor_state{state="${state}"}`])
      assert.equal(samples['ftw_monitor_healthy'], state === 'healthy' ? 1 : 0)
      const { body } = await openPage(port)
      const [, sign, grade] = /<title>(.) [^]*<h1 class="(\w+)">/.exec(body) ?? []
      return `${state}, ${sign} ${grade}, ${status} ${json.status} ${json.output}: ${line}`
    }
    await untilVerdict(monitor, 'Warmup in progress')
    const warming = 'Warmup in progress: down #Warmup in progress\n'
    assert.equal(await told(), `warming_up, … warn, 503 fail ${warming}`)
    gate.open()
    await untilVerdict(monitor)
    assert.match(await told(), /^healthy, ✓ pass, 200 pass undefined: up ([1-9]\d|100)%\n$/)

    monitor.registerDatabase('cache', { isConnected: () => false, optional: true })
    monitor.registerDatabase('silent', { isConnected: hang, optional: true })
    assert.match(await told(), /^healthy, ✓ pass, 200 warn undefined: up \d+%\n$/)
    const text = await ask(port, 'status\n')
    assert.match(text, /^OK\n[^]*^database   silent +no answer for \d+ s \(optional\)$/m)
    const { json } = await askHealthJson(port)
    assert.equal(json.description, `http://127.0.0.1:${instancePort}`)
    const checks = ['uptime', 'warmup:duration', 'prober:interval', 'memory:resident']
    for (const name of checks) assert.ok(json.checks[name]?.[0], name)
    assert.equal(json.checks['database:responseTime'].length, 3)

    isConnected = false
    const reason = "Error: Database 'main' disconnected."
    assert.equal(await told(), `dependency_failed, ✗ fail, 503 fail ${reason}: down #${reason}\n`)
    const [broken = '', optional = ''] = rowsOfPage((await openPage(port)).body)
    assert.match(`${broken}\n${optional}`, /^database\|main\|.*\ndatabase\|cache\|/)
    const figures = '{"error":"Database \'main\' disconnected."}\n'
    assert.equal(await ask(port, 'perf_metrics\n'), figures)
    void monitor.drain({ reason: 'Warmup failed' })
    assert.equal(await told(), 'draining, … warn, 503 fail Warmup failed: stopped #Warmup failed\n')
    const { changes } = await monitor.status()
    assert.equal(
      changes.map(({ state, grade }) => `${state} ${grade}`).join(', '),
      'booting warn, warming_up warn, healthy pass, dependency_failed fail, draining warn'
    )
  })

  test('metrics is text that Prometheus reads: databases and requests, each with help and type', async (t) => {
    const handler: http.RequestListener = ({ url }, response) =>
      response.writeHead(url === '/broken' ? 500 : 200).end()
    const { monitor, port, instancePort } = await bootInstance(t, { performers: WARM, handler })
    const activity = monitor.registerDatabase('main', { isConnected: () => true })
    monitor.registerDatabase('we"ird\\', { isConnected: () => false })
    monitor.registerDatabase('lost', { isConnected: hang, optional: true })
    monitor.registerCheck('mail', () => false, { optional: true })
    activity.loads(5)
    activity.stores(2)
    activity.connections()
    for (const path of ['/', '/', '/broken']) await getPage(instancePort, path)

    const { headers, body } = await getPage(port, '/metrics')
    assert.match(headers['content-type'] ?? '', /^text\/plain; version=0\.0\.4\b/)
    const samples = readSamples(body)
    const expected = {
      [`ftw_monitor_build_info{version="${monitor.VERSION}"}`]: 1,
      ftw_monitor_healthy: 0,
      ftw_monitor_warmup_done: 1,
      'ftw_monitor_database_connected{database="main"}': 1,
      'ftw_monitor_database_connected{database="we\\"ird\\\\"}': 0,
      'ftw_monitor_database_connected{database="lost",optional="true"}': 0,
      'ftw_monitor_check_passing{check="mail",optional="true"}': 0,
      'ftw_monitor_database_loads_total{database="main"}': 5,
      'ftw_monitor_database_stores_total{database="main"}': 2,
      'ftw_monitor_database_connections_total{database="main"}': 1,
      ftw_monitor_http_requests_in_flight: 0,
      ftw_monitor_http_requests_total: 3,
      ftw_monitor_http_errors_total: 1
    }
    assert.deepEqual({ ...samples, ...expected }, samples)
    assert.equal(samples['ftw_monitor_database_answer_seconds{database="lost"}'], undefined)
    for (const [name, value] of Object.entries(samples)) {
      const family = name.replace(/\{.*/, '')
      const kind = family.endsWith('_total') ? 'counter' : 'gauge'
      const head = `^# HELP ${family} \\S.*\\n# TYPE ${family} ${kind}\\n${family}[ {]`
      assert.match(body, new RegExp(head, 'm'))
      assert.ok(value >= 0, `${name} ${value}`)
    }
  })

  test('a browser gets a page that refreshes itself without a script until it is told to pause, links to what only reads, and allows itself nothing but its style', async (t) => {
    const { monitor, port, instancePort } = await bootInstance(t, { performers: WARM })
    monitor.register('stock', '', () => {}, { http: true })
    monitor.register('sell', '', () => {})
    monitor.register('page', '', (connection) => connection.write('mine\n'), { http: true })
    const { status, headers, body } = await openPage(port)
    assert.deepEqual([status, headers['content-type']], [200, 'text/html; charset=utf-8'])
    assert.match(body, /<h1 class="pass">OK<\/h1>/)
    const title = `127.0.0.1:${instancePort}, process ${process.pid}`
    assert.ok(body.includes(`<title>✓ ${title} - OK</title>`), body)
    assert.match(rowsOfPage(body).join(), /^instance\|http:\/\/127\.0\.0\.1:\d+, up /)
    assert.match(body, /<p>For \d+.s, since \d{4}-\d\d-\d\d \d\d:\d\d:\d\dZ<br>/)
    assert.match(body, /\d\u00a0(s|min), 0\u00a0requests in flight, .*\d\u00a0MiB\n/)
    const foreign = await openPage(port, { headers: { Host: '<b>' } })
    assert.ok(foreign.body.includes('<title>✓ &#60;b&#62; - OK</title>'), foreign.body)

    assert.match(body, /<meta http-equiv="refresh" content="2">/)
    assert.match(body, /<a href="\?pause">/)
    assert.doesNotMatch(body, /<script|<link|<img|<form|url\(|https?:\/\/(?!127\.0\.0\.1)/)
    const paused = await openPage(port, { path: '/?pause' })
    assert.doesNotMatch(paused.body, /http-equiv/)
    assert.match(paused.body, /<a href="\/">/)

    const links = Array.from(body.matchAll(/<a href="\/(\w+)">\1<\/a>/g), ([, name]) => name)
    for (const name of ['stock', 'status', 'metrics']) assert.ok(links.includes(name), name)
    for (const name of ['sell', 'drain', 'resume', 'interactive', 'quit', 'readyz', 'livez']) {
      assert.ok(!links.includes(name), name)
    }
    for (const name of links) assert.equal((await getPage(port, `/${name}`)).status < 501, true)
    assert.equal((await openPage(port, { path: '/page' })).body, 'mine\n')

    const nonces = new Set<string>()
    for (const page of [await openPage(port), await openPage(port), paused]) {
      const [, nonce = ''] = /<style nonce="([\w-]{20,})">/.exec(page.body) ?? []
      nonces.add(nonce)
      const policy =
        `default-src 'none'; style-src 'nonce-${nonce}'; base-uri 'none'; form-action 'none'; ` +
        `frame-ancestors 'none'`
      assert.equal(page.headers['content-security-policy'], policy)
      assert.doesNotMatch(page.body, /\sstyle=|\son\w+=/)
    }
    assert.equal(nonces.size, 3)
  })

  test('page and object tell how far a drain is, and whether it is finished', async (t) => {
    const { monitor, port, finishRequest } = await bootWithRequest(t)
    await askTimes(3, port, 'health_check\n')
    /** The heading and the row on the page. */
    const told = async () => {
      const { body } = await openPage(port)
      const [, heading] = /<h1 class="warn">(.*)<\/h1>/.exec(body) ?? []
      const row = rowsOfPage(body).find((each) => each.startsWith('draining|'))
      return [heading, row?.replace(/ for \d+\.\d s,/, '')]
    }
    const drained = monitor.drain({ reason: 'until noon', fall: 1 })
    const begun = 'draining|▢ 0 of 1 probers know, 1 request in flight'
    assert.deepEqual(await told(), ['Draining: until noon', begun])

    await ask(port, 'health_check\n')
    const { draining } = await monitor.status()
    const expected = { probers: 1, probersInformed: 1, finished: false, shutdown: false }
    assert.deepEqual({ ...draining, ...expected }, draining)
    await finishRequest()
    await drained
    const finished = 'draining|✓ finished, 1 of 1 probers know, 0 requests in flight'
    assert.deepEqual(await told(), ['Draining: until noon (finished)', finished])

    const isShutDown = monitor.shutdown({ minimumMs: 2_000, timeoutMs: 4_000 })
    await until(async () => (await told())[0] === 'Draining (shutting down)', 'it shuts down')
    assert.equal((await monitor.status()).draining?.shutdown, true)
    await isShutDown // a shutdown that goes on would end the process of the tests at its deadline
  })

  test('what came from outside is text on the page, never markup, and no red status contains OK, in any rendering', async (t) => {
    const evil = `<b>&"'</b><script>alert(1)</script>${EVIL}OK OOKK`
    const fail = () => Promise.reject(new Error(evil))
    const { monitor, port } = await bootInstance(t, {
      databases: {
        BOOKS: { isConnected: fail },
        OKOK: { isConnected: () => true },
        [`<i>"'&`]: { isConnected: fail, optional: true }
      },
      performers: { [`/BOOKS<u>"'&`]: fail, '/OK': () => {} },
      until: 'started'
    })
    monitor.register('OKAY', 'OK', () => {}, { http: true })
    monitor.register(`<s>"'&`, '', () => {}, { http: true })
    await until(async () => (await openPage(port)).body.includes('failed after'), 'a failed site')
    const known =
      '!DOCTYPE html head meta title style body main h1 p br a table tr th td progress figure div ' +
      'svg polyline rect figcaption span'
    const expectHarmless = async () => {
      assert.doesNotMatch(await ask(port, 'status\n'), /OK/)
      for (const path of ['/', '/?pause', '/status', '/readyz', '/health_check']) {
        assert.doesNotMatch((await openPage(port, { path })).body, /OK/)
      }
      const { body } = await openPage(port)
      const tags = new Set(Array.from(body.matchAll(/<\/?([^\s>]*)/g), ([, name]) => name))
      for (const tag of tags) assert.ok(known.split(' ').includes(tag!), `<${tag}>`)
      assert.doesNotMatch(body, /&(?!#\d+;)/)
      assert.doesNotMatch(body.replaceAll('\n', ''), UNSAFE)
      assert.equal((body.match(/"/g) ?? []).length % 2, 0)
      assert.ok(body.includes('&#60;b&#62;&#38;&#34;&#39;&#60;/b&#62;'))
    }
    await expectHarmless()
    void monitor.drain({ reason: `all is OK, ${evil}` })
    await expectHarmless()
  })

  test('a password in a URL is shown to nobody, whatever it holds, in no text of ours, however that is cut, and a path is no password', async (t) => {
    const url = 'postgres://user:hunter2@db.internal/shop'
    let text = `cannot connect to ${url}`
    const fail = () => {
      throw new Error(text)
    }
    const { monitor, port, instancePort, logger } = await bootInstance(t, {
      handler: () => {},
      databases: { main: { isConnected: fail }, [url]: { isConnected: () => true } },
      performers: WARM,
      prepare: ({ register }) => register('own', '', fail),
      until: 'started'
    })
    await untilVerdict(monitor, /cannot connect/)
    const hanging = await converse(t, instancePort)
    hanging.say(headOf('//user:hunter2@host/path'))
    await until(async () => (await askMonitor(port, '0')).count === 1, 'a request is in flight')
    assert.match(await ask(port, 'monitor 0\n'), / GET \/\/\*\*\*@host\/path\n$/)
    for (const line of ['status', 'metrics', 'own', `dbinfo ${url}`, url, `help ${url}`]) {
      assert.doesNotMatch(await ask(port, `${line}\n`), /hunter2|user:/)
    }
    assert.doesNotMatch((await openPage(port)).body, /hunter2|user:/)

    // Half a password is one, too.
    for (let length = 440; length < 505; length++) {
      text = `${'x'.repeat(length)} postgres://user:${'hunter2'.repeat(200)}@host`
      assert.doesNotMatch(await ask(port, 'health_check\n'), /hu/)
    }
    text = `${'x'.repeat(1_960)} postgres://user:${'hunter2'.repeat(200)}@host`
    assert.doesNotMatch(await ask(port, 'own\n'), /hu/) // its stack is logged

    const shown = async (reason: string) => {
      void monitor.drain({ reason })
      return await ask(port, 'health_check\n')
    }
    assert.equal(await shown(`as ${url} says`), 'as postgres://***@db.internal/shop says\n')
    for (const user of ['app', '', 'app:12', 'a.b']) {
      const secrets = ['hun/ter', 'hun@te/r', '/hunter', ':hun:te/r', 'hunter?#/', 'hunter//x@y']
      for (const secret of secrets) {
        const reply = await shown(`is (postgres://${user}:${secret}@db.internal/shop)`)
        assert.equal(reply, 'is (postgres://***@db.internal/shop)\n')
      }
    }
    assert.equal(await shown('redis://tok/en@db x@y'), 'redis://***@db x@y\n')
    assert.equal(await shown(`http://app:pa@host/@@warmup`), 'http://***@host/@@warmup\n')
    const harmless = [
      'http://localhost:8080/@@warmup',
      'http://[::1]:8080/shop/@@warmup',
      '(file:///srv/node_modules/@scope/name@1.0/index.js:1:2)',
      'https://registry.npmjs.org/@types/node',
      'root@localhost'
    ]
    for (const reason of harmless) assert.equal(await shown(reason), `${reason}\n`)
    // In the frames of a stack there is Node.js's addChunk.
    assert.doesNotMatch(logger.lines.join('\n'), /(?<!addC)hun|user:/)
    assert.ok((await timeOf(shown('//a'.repeat(200_000)))) < 2_000)
  })

  test('only this machine is told addresses, texts of errors and requests in flight', async (t) => {
    const { server, held } = await serveHeld(t)
    const fail = () => Promise.reject(new Error('secret'))
    const connections = () => [{ openedAt: 0, info: '/secret' }]
    const { port, instancePort } = await bootInstance(t, {
      server,
      databases: { main: { isConnected: fail, optional: true, connections } },
      performers: { '/': fail },
      prepare: ({ register }) => register('own', '', () => {}, { local: true }),
      until: 'started'
    })
    getPage(instancePort, '/held').catch(() => {})
    await until(() => held.length === 1, 'a request is in flight')
    await until(async () => (await ask(port, 'status\n')).includes('failed after'), 'a failed site')
    await askTimes(3, port, 'agent_check\n')
    const told = async (options: PageOptions) => {
      const { json } = await askHealthJson(port, options)
      const [prober] = json.checks['prober:interval']
      const [database] = json.checks['database:responseTime']
      const [site] = json.checks['warmup:duration']
      const why = site.output.replace(/^.* s\b/, '')
      const rows = rowsOfPage((await openPage(port, options)).body).join('\n')
      assert.ok(rows.includes(`\nprober|${prober.componentId}|`), rows)
      assert.ok(rows.includes(`database|main|${database.output}\n`), rows)
      const list = (await getPage(port, '/monitor/0', options)).body
      const [, requests] = /^1\nVmRSS:.*\n(?:\d+\.\d (.*)\n)?$/.exec(list) ?? [list, list]
      return `${prober.componentId}, ${database.output}${why}, ${requests}`
    }
    const all = '127.0.0.1, failed: secret (optional): secret, GET /held'
    const little = 'a prober, failed (optional), undefined'
    const browser = { 'User-Agent': 'Mozilla/5.0', Host: `localhost:${port}` }
    const answers: [told: string, headers: Record<string, string>][] = [
      [all, {}],
      // A page that refreshes itself, as Chromium sends it.
      [all, { ...browser, 'Sec-Fetch-Site': 'none' }],
      [all, { ...browser, 'Sec-Fetch-Site': 'same-origin' }],
      [little, { Host: 'rebound.example', 'Sec-Fetch-Site': 'same-origin' }],
      [little, { 'X-Forwarded-For': '10.0.0.5', 'Sec-Fetch-Site': 'same-origin' }],
      [little, { ...browser, 'Sec-Fetch-Site': 'cross-site' }],
      [little, { ...browser, 'Sec-Fetch-Site': 'same-site' }],
      [little, browser]
    ]
    for (const [expected, headers] of answers) {
      assert.equal(await told({ headers }), expected, JSON.stringify(headers))
    }
    assert.match(await ask(port, 'GET /monitor/0 HTTP/1.0\r\n\r\n'), / GET \/held\n$/)

    if (OUTSIDE === undefined) return t.diagnostic(NEEDS_OUTSIDE.skip ?? '')
    const headers = { 'Sec-Fetch-Site': 'same-origin' }
    assert.equal(await told({ from: OUTSIDE, headers }), little)
    const replies = {
      'monitor 0 main\n': /^1\nVmRSS:\t +[1-9]\d* kB\n$/,
      'own\n': 'own is for this machine only\n',
      'drain x\n': 'drain is for this machine only\n',
      'resume\n': 'resume is for this machine only\n'
    }
    await assertReplies(port, replies, { from: OUTSIDE })
  })

  test("registerMetrics adds the service's own metrics, whose families replace ours, and of OpenMetrics what Prometheus knows", async (t) => {
    const { monitor, port } = await bootInstance(t, { performers: WARM })
    let given: string[] = []
    monitor.registerMetrics(async () => '# TYPE orders gauge\norders 1\r\n')
    monitor.registerMetrics(() => given.join('\n'))
    const own = [
      '# HELP process_resident_memory_bytes Own words.',
      '# TYPE process_resident_memory_bytes gauge',
      'process_resident_memory_bytes 7',
      '# TYPE shop_seconds histogram',
      'shop_seconds_bucket{path="a\\"b\\\\c\\n# TYPE d",le="+Inf"} 2 1700000000000',
      'shop_seconds_sum{path="ü{x=\\"y\\"}"} 1.5e-3',
      'shop_seconds_count 2',
      'stock NaN',
      'stock{size="big"} +Inf'
    ]
    const counter = ['# TYPE process_cpu_seconds counter', 'process_cpu_seconds_total 1.5']
    const bare = ['sold 1', 'process_cpu_seconds_total 1.5']
    const rows: [given: string[], taken: string[]][] = [
      [[...own, '', '# a comment', '# TYPE orders gauge', 'orders 2'], own],
      [
        [
          '# TYPE stock counter',
          '# UNIT stock items',
          'stock_total 1 1700000000 # {trace="a b"} 1 2.5',
          'sold{kind="# {x} 1"} 2 # {trace_id="7"} 0.5',
          '# EOF'
        ],
        ['# TYPE stock counter', 'stock_total 1 1700000000000', 'sold{kind="# {x} 1"} 2']
      ],
      [counter, counter], // which replaces ours, whose name has a _total more
      [bare, bare]
    ]
    for (const [lines, taken] of rows) {
      given = lines
      const text = await ask(port, 'metrics\n')
      assert.ok(text.endsWith(`\norders 1\n${taken.join('\n')}\n`), text)
      assert.equal(text.match(/^process_cpu_seconds_total /gm)?.length, 1)
      const types = text.match(/^# TYPE \S+/gm) ?? []
      assert.equal(new Set(types).size, types.length)
      assert.match(text, /^ftw_monitor_healthy 1$/m)
    }
  })
})

describeInProcess('Figures, metrics and status', ALONE, () => {
  test('monitor counts 200 requests in flight and lists them by age, aborted ones no more, or the connections of the database that it is asked for; perf_metrics counts in its window', async (t) => {
    const clock = fakeClock(t)
    const held: http.ServerResponse[] = []
    const handler: http.RequestListener = (_, response) => held.push(response)
    const { monitor, port, instancePort } = await bootInstance(t, { performers: WARM, handler })
    const untilCounted = (count: number) =>
      until(async () => (await askMonitor(port, '0')).count === count, `${count} are counted`)
    const begin = async (path: string, count: number) => {
      const sockets = Array.from({ length: 100 }, () => connectTo(instancePort, {}))
      for (const socket of sockets) socket.on('error', () => {}).write(headOf(path))
      await untilCounted(count)
      return sockets
    }
    const early = await begin('/early', 100)
    clock.now += 7_500
    await begin('/late?token=secret', 200)
    clock.now += 5_000

    for (const socket of early.slice(0, 50)) socket.destroy()
    await untilCounted(150)
    const late = Array.from({ length: 100 }, () => ({ age: 5, info: 'GET /late' }))
    const old = Array.from({ length: 50 }, () => ({ age: 12.5, info: 'GET /early' }))
    assert.deepEqual((await askMonitor(port, '0')).open, [...late, ...old])
    for (const [age, open] of Object.entries({ 10: old, '': [] })) {
      const { rss: _, ...listed } = await askMonitor(port, age)
      assert.deepEqual(listed, { count: 150, open })
    }
    for (const response of held) response.setHeader('Connection', 'close').end()
    await untilCounted(0)

    const now = Date.now()
    t.mock.method(Date, 'now', () => now)
    const connections = async () => [
      { openedAt: new Date(now - 200_000), info: '/import' },
      { openedAt: now - 500, info: '/a b' },
      { openedAt: now - 120_040, info: '/report' }
    ]
    monitor.registerDatabase('shop', { isConnected: () => true, connections }).loads(6)
    clock.now += 100_000
    for (const [words, loads] of Object.entries({ '': 6, '- 101': 6, 'shop 100': 0 })) {
      assert.equal((await askPerfMetrics(port, words)).db.loads, loads, words)
    }
    await assertReplies(port, {
      'monitor 0 shop\n': /^3\nVmRSS:.*\n0\.5 \/a b\n120\.0 \/report\n200\.0 \/import\n$/,
      'monitor 150 shop\n': /^3\nVmRSS:.*\n200\.0 \/import\n$/
    })
  })

  test('monitor, perf_metrics and metrics have the figures of the process', async (t) => {
    const used = { rss: 7_168, heapTotal: 60, heapUsed: 50, external: 40, arrayBuffers: 30 }
    t.mock.method(process.memoryUsage, 'rss', () => used.rss)
    t.mock.method(process, 'memoryUsage', () => used)
    t.mock.method(process, 'cpuUsage', () => ({ user: 2_500_000, system: 1_000_000 }))
    t.mock.method(process, 'uptime', () => 12.9)
    const { port } = await bootInstance(t, { performers: WARM })
    const isLoadKnown = async () => 'nodejs_eventloop_utilization' in (await askMetrics(port))
    await until(isLoadKnown, 'the load is known')
    const { instance, memory, cpu, http: counts } = await askPerfMetrics(port)
    const samples = await askMetrics(port)

    assert.deepEqual(instance, { uptime: 12, pid: process.pid })
    const heap = { heap_used: 50, heap_total: 60, external: 40, array_buffers: 30 }
    assert.deepEqual(memory, { rss: 7_168, uss: -1, pss: -1, ...heap })
    assert.deepEqual(cpu, { user: 2_500_000, system: 1_000_000 })
    assert.deepEqual(counts, { in_flight: 0, requests: 0, errors: 0 })
    assert.equal((await askMonitor(port, '')).rss, 7)
    const expected = {
      [`nodejs_version_info{version="${process.version}"}`]: 1,
      process_cpu_user_seconds_total: 2.5,
      process_cpu_system_seconds_total: 1,
      process_cpu_seconds_total: 3.5,
      process_start_time_seconds: performance.timeOrigin / 1_000,
      process_resident_memory_bytes: 7_168,
      nodejs_heap_size_total_bytes: 60,
      nodejs_heap_size_used_bytes: 50,
      nodejs_external_memory_bytes: 40
    }
    for (const [name, figure] of Object.entries(expected)) assert.equal(samples[name], figure, name)
    const utilization = samples['nodejs_eventloop_utilization']!
    assert.ok(utilization >= 0 && utilization <= 1, `${utilization}`)
  })

  test('the load of the event loop is that of the last ten seconds, the same for all; where the runtime cannot tell, it is -1, the share 100 %, and no metric', async (t) => {
    const loop = { idle: 100, active: 100 }
    const measure = (now = loop, before = { idle: 0, active: 0 }) => {
      const idle = now.idle - before.idle
      const active = now.active - before.active
      return { idle, active, utilization: active / (idle + active) }
    }
    t.mock.method(performance, 'eventLoopUtilization') // so that it is put back
    const setMeasure = (value?: typeof measure) => {
      Object.defineProperty(performance, 'eventLoopUtilization', { value, configurable: true })
    }
    setMeasure(undefined)
    const timers = takeTimers(t)
    const { port, logger } = await bootInstance(t, { performers: WARM })
    const utilization = async () => (await askPerfMetrics(port)).loop.utilization as number
    timers.pass(1_000)
    assert.equal(await utilization(), -1)
    assert.equal(await ask(port, 'agent_check\n'), 'up 100%\n')
    assert.doesNotMatch(await ask(port, 'metrics\n'), /eventloop_utilization/)
    assert.deepEqual(errorsOf(logger), [])

    setMeasure(measure)
    timers.pass(1_000)
    loop.active += 150
    timers.pass(1_000)
    assert.equal(await utilization(), 1)
    assert.equal(await utilization(), 1, 'whoever asks')
    assert.equal(await ask(port, 'agent_check\n'), 'up 10%\n')
    loop.idle += 450
    timers.pass(1_000)
    assert.equal(await utilization(), 0.25)
    assert.equal(await ask(port, 'agent_check\n'), 'up 75%\n')
    timers.pass(10_000)
    loop.idle += 150
    timers.pass(1_000)
    assert.equal(await utilization(), 0)
  })

  test('what is wrong of a collector costs itself alone, and one line in the log names it; one that hangs is waited for 5 s', async (t) => {
    const timers = takeTimers(t, ['setTimeout'])
    const { monitor, port, logger } = await bootInstance(t, { performers: WARM })
    let answer: () => unknown = thrower
    monitor.registerMetrics(() => answer() as string)
    monitor.registerMetrics(() => 'orders 1\n')
    const stock = '# TYPE stock gauge\nstock 1\n'
    const expectLogged = (reason: string) => {
      assert.equal(warningsOf(logger).length, 1, warningsOf(logger).join('\n'))
      assert.ok(warningsOf(logger).join('\n').includes(reason), warningsOf(logger).join('\n'))
      logger.lines.length = 0
    }
    const expectLeft = async (left: string, reason: string, bad: () => unknown) => {
      answer = bad
      for (let time = 0; time < 2; time++) {
        const text = await ask(port, 'metrics\n')
        assert.ok(text.endsWith(`\n${left}orders 1\n`), text)
        assert.equal(text.includes('stock'), left !== '')
        assert.match(text, /^ftw_monitor_healthy 1$/m)
      }
      answer = () => stock
      assert.ok((await ask(port, 'metrics\n')).endsWith(`\n${stock}orders 1\n`))
      expectLogged(reason)
    }
    const wrongLines =
      'this is no sample, stock{a="b} 1, stock 12abc, 1stock 1, stock, stock 1 x'.split(', ')
    for (const line of wrongLines) {
      await expectLeft(stock, `: ${line}`, () => `# TYPE stock gauge\n${line}\n${line}\nstock 1\n`)
    }
    await expectLeft('', 'trap', thrower)
    await expectLeft('', 'boom OK', () => Promise.reject(new Error('boom\nOK')))
    await expectLeft('', 'no text', () => undefined)
    await expectLeft('', '<!DOCTYPE', () => '<!DOCTYPE html><h1>502</h1>')
    await expectLeft('', '# TYPE stock unknown', () => '# TYPE stock unknown')

    const hanging = latch()
    answer = () => {
      hanging.open()
      return hang()
    }
    const peer = await converse(t, port)
    peer.say('metrics\n')
    await hanging.opened
    timers.pass(4_000)
    await untilSeen(port)
    assert.equal(peer.transcript, '')
    timers.pass(2_000)
    await until(() => peer.isClosed, 'it is answered')
    for (const text of [peer.transcript, await ask(port, 'metrics\n')]) {
      assert.match(text, /^orders 1$/m)
    }
    expectLogged('leaves metrics out: no answer in time')
  })

  test('the longest lag, 5xx answers and the mean answer time are those of the last 30 s', async (t) => {
    const clock = fakeClock(t)
    const timers = takeTimers(t, ['setInterval'], clock)
    const server = await serve(t, ({ url }, response) => {
      clock.now += Number(url?.slice(1))
      response.writeHead(url === '/400' ? 503 : 200).end()
    })
    const { monitor, port } = await bootInstance(t, { performers: WARM, server })
    const told = async () => {
      const [, row] = /^last 30 s +(.*)$/m.exec(await ask(port, 'status\n')) ?? []
      return [row, (await askMetrics(port))['ftw_monitor_eventloop_lag_seconds']]
    }
    timers.pass(10_000)
    const nothing = ['longest lag 0 ms, 0 answers', 0]
    assert.deepEqual(await told(), nothing, 'what was before the start counts for nothing')
    for (const path of ['/20', '/400', '/30']) await getPage(portOf(server), path)
    timers.pass(1_000)
    const row = 'longest lag 200 ms, 3 answers, 150 ms on average, 1 with 5xx'
    assert.deepEqual(await told(), [row, 0.2])
    const { eventLoopLagSeconds, answers, errors, meanAnswerMs } = await monitor.status()
    assert.deepEqual([eventLoopLagSeconds, answers, errors, meanAnswerMs], [0.2, 3, 1, 150])
    const { json } = await askHealthJson(port)
    const figures = ['eventLoop:lag', 'answers:count', 'answers:errors', 'answers:meanTime']
    const observed = figures.map((name) => json.checks[name]?.[0]?.observedValue)
    assert.deepEqual([json.status, ...observed], ['pass', 0.2, 3, 1, 150])
    const { body } = await openPage(port)
    assert.match(body, /<polyline class="requests" points="(\d+\.5,99\.0 ){10}119\.8,74\.5"/)
    const now = /Now: loop \d+\u00a0% busy,\n3\u00a0requests a second$/m
    assert.match(body.replace(/<[^>]*>/g, ''), now)

    timers.stall(1_200)
    timers.pass(0)
    timers.stall(150)
    timers.pass(29_000)
    assert.deepEqual(await told(), ['longest lag 1.2 s, 0 answers', 1.2])
    assert.equal((await askHealthJson(port)).json.status, 'warn')
    timers.pass(2_500)
    assert.deepEqual(await told(), nothing)
    timers.pass(200_000)
    assert.match((await openPage(port)).body, / class="requests" points="([\d.,]+ ?){120}"/)
    for (const [requests, scale] of [
      [10, 10],
      [11, 20],
      [21, 50],
      [51, 100]
    ] as const) {
      await Promise.all(Array.from({ length: requests }, () => getPage(portOf(server), '/0')))
      timers.pass(1_000)
      const label = `<span class="requests">${scale}\u00a0requests a second</span>`
      assert.ok((await openPage(port)).body.includes(label), label)
    }
    const upFor = async () => /, up (\d+ \w+)/.exec(await ask(port, 'status\n'))?.[1]
    const rows = { 119: '119 s', 120: '2 min', 7_199: '119 min', 7_200: '2 h', 172_800: '2 days' }
    for (const [seconds, text] of Object.entries(rows)) {
      t.mock.method(process, 'uptime', () => Number(seconds))
      assert.equal(await upFor(), text)
    }
  })

  test('of blocks of the event loop the log tells at most once in ten seconds, but of a longer one at once, with what was in flight, and not while it boots', async (t) => {
    const clock = fakeClock(t)
    const timers = takeTimers(t, ['setInterval'], clock)
    const held: http.ServerResponse[] = []
    const server = http.createServer(({ url }, response) => {
      if (!url?.startsWith('/burn')) return held.push(response)
      clock.now += 1_750 // of which a tick is no block
      return response.end()
    })
    closeLater(t, server)
    const monitor = await importMonitor(t)
    const logger = recorder({ isBlockWanted: true })
    monitor.registerWarmup('/', () => {})
    void monitor.start({ server, listen: LOOPBACK, logger })
    timers.stall(1_500)
    timers.pass(0)
    assert.deepEqual(warningsOf(logger), [])

    server.listen(LOOPBACK)
    await untilVerdict(monitor)
    // As on a machine where the CPU is ours whenever we want it.
    t.mock.method(process, 'cpuUsage', () => ({ user: performance.now() * 1_000, system: 0 }))
    const expectTold = (...texts: string[]) => {
      const told = warningsOf(logger).map((line) => line.replace(/^.*monitor noticed /, ''))
      assert.deepEqual(told, texts)
      logger.lines.length = 0
    }
    const block = (ms: number) => {
      timers.stall(ms)
      timers.pass(1_000)
    }
    const blocked = 'that the event loop was blocked for'
    const waited = 'no request was being served, those that came meanwhile waited'
    timers.pass(1_000)
    await getPage(portOf(server), '/burn?token=secret')
    timers.pass(1_000)
    expectTold(`${blocked} 1.5 s; in flight: GET /burn`)
    block(3_000)
    expectTold(`${blocked} 3.0 s; ${waited}`)
    for (const ms of [2_000, 2_500, 1_500, 999]) block(ms)
    timers.pass(1_000)
    expectTold(`3 s ago ${blocked} 2.5 s; ${waited}; besides, 2 shorter blocks`)
    block(1_200)
    timers.pass(10_000)
    expectTold(`5 s ago ${blocked} 1.2 s; ${waited}`)
    timers.pass(20_000)

    const paths = ['/1?token=secret', '/2', '/3', `/late/${'x'.repeat(200)}?token=secret`]
    for (const [index, path] of paths.entries()) {
      getPage(portOf(server), path).catch(() => {})
      await until(() => held.length === index + 1, 'it is held')
      timers.pass(100)
    }
    const inFlight = `in flight: GET /late/${'x'.repeat(70)}, GET /3, GET /2, 1 other`
    block(2_000)
    expectTold(`${blocked} 2.0 s; ${inFlight}`)

    // The time of a suspended process passes, but it uses no CPU.
    timers.pass(20_000)
    const usage = process.cpuUsage()
    t.mock.method(process, 'cpuUsage', () => usage)
    block(1_500)
    const idly =
      'hardly used the CPU: the process was suspended or starved, or made a synchronous call'
    expectTold(`that the event loop stood still for 1.5 s, and ${idly}; ${inFlight}`)

    for (const response of held) response.end()
    await close(server)
    clock.now += 60_000 // which is no block, since the monitor is closed
    server.listen(LOOPBACK)
    await untilVerdict(monitor)
    timers.pass(1_000)
    assert.equal((await monitor.status()).eventLoopLagSeconds, 0)
    expectTold()
  })
})

// --- The wire: PROXY headers ---------------------------------------------------------------------

/** A header of the PROXY protocol's version 2: its byte for version and command, and what follows. */
function proxyBytes(command: number, rest: Buffer, length = rest.length): Buffer {
  const head = Buffer.from('\r\n\r\n\0\r\nQUIT\n\0\x11\0\0', 'latin1')
  head.writeUInt8(command, 12)
  head.writeUInt16BE(length, 14)
  return Buffer.concat([head, rest])
}

const LOCAL_COMMAND = 0x20
const PROXY_COMMAND = 0x21
/** From 127.0.0.1:4660 to 10.0.0.5:8160. */
const TCP4_ADDRESSES = Buffer.from('7f0000010a00000512341fe0', 'hex')

/** What balancers send before anything else, if they speak the PROXY protocol. */
const PROXY_HEADERS: Record<string, Buffer> = {
  'version 1': Buffer.from('PROXY TCP4 127.0.0.1 10.0.0.5 4660 8160\r\n'),
  'version 1 of IPv6': Buffer.from('PROXY TCP6 ::1 2001:DB8::5 4660 8160\r\n'),
  'version 1 of no address': Buffer.from('PROXY UNKNOWN\r\n'),
  'version 1 at its longest': Buffer.from(`PROXY UNKNOWN ${'f'.repeat(91)}\r\n`),
  'version 2': proxyBytes(PROXY_COMMAND, TCP4_ADDRESSES),
  'version 2 of no address': proxyBytes(LOCAL_COMMAND, Buffer.alloc(0)),
  'version 2 like lines': proxyBytes(PROXY_COMMAND, Buffer.from('\ndrain\n\nquit\n')),
  'version 2 at its longest': proxyBytes(LOCAL_COMMAND, Buffer.alloc(4_080, 'drain\n'))
}

/** Asks behind a PROXY header. */
function askBehind(where: number | string, header: Buffer, text: string): Promise<string> {
  return ask(where, Buffer.concat([header, Buffer.from(text)]))
}

describeInProcess('The wire: PROXY headers', TOGETHER, () => {
  test('bytes that come one by one are answered as those that come at once, also behind a PROXY header, but who sends that is a stranger', async (t) => {
    const { port } = await bootInstance(t, { performers: WARM })
    const path = join(scratchFolder(t), 'monitor')
    const other = await importMonitor(t)
    await other.start({ server: await serve(t), listen: { path }, logger: recorder() })
    const dialogue = 'interactive\nnope\n\nlivez\r\nquit\n'
    const pages = headOf('/livez') + headOf('/livez', 'Connection: close')
    const askSlowly = async (header: Buffer, text: string) => {
      const peer = await converse(t, port)
      for (const byte of Buffer.concat([header, Buffer.from(text)])) {
        peer.socket.write(Buffer.of(byte))
        await nextTurn()
      }
      await until(() => peer.isClosed, 'all is answered')
      return peer.transcript
    }
    const expectSame = async (header: Buffer) => {
      assert.equal(await ask(port, header, { end: true }), '')
      const invalid = 'Invalid command \'nope\'\nTry "help".\n'
      const answer = `${INTERACTIVE}${invalid}${invalid}Alive\nGoodbye.\n`
      assert.equal(await askBehind(port, header, dialogue), answer)
      assert.equal(await askSlowly(header, dialogue), answer)
      const resumed = header.length > 0 ? 'resume is for this machine only\n' : 'Resumed\n'
      for (const where of [port, path]) {
        assert.equal(await askBehind(where, header, 'resume\n'), resumed)
      }
      for (const page of [await askBehind(port, header, pages), await askSlowly(header, pages)]) {
        assert.equal(page.match(/^HTTP\/1\.1 200 OK\r\n/gm)?.length, 2, page)
        assert.equal(page.match(/^Alive\n/gm)?.length, 2, page)
      }
    }
    await Promise.all([Buffer.of(), ...Object.values(PROXY_HEADERS)].map(expectSame))
  })

  test('a wrong PROXY header or a second one is refused in one line; what only begins like one is a line, or HTTP', async (t) => {
    const { monitor, port } = await bootInstance(t, { performers: WARM })
    for (const header of Object.values(PROXY_HEADERS)) {
      const reply = await askBehind(port, Buffer.concat([header, header]), 'livez\n')
      assert.match(reply, /^Invalid command '(PROXY| )'\nTry "help".\n$/)
    }
    const post: Command = (connection, word) => connection.write(`posted ${word}\n`)
    monitor.register('POST', '', post)
    monitor.register('PROXY', '', post)
    const wrong = 'Error: wrong PROXY header\n'
    const unknown = proxyBytes(0x22, TCP4_ADDRESSES)
    assert.equal(await askBehind(port, unknown, 'livez\nlivez\n'), wrong)
    const long = proxyBytes(PROXY_COMMAND, TCP4_ADDRESSES, 4_081)
    assert.equal(await askBehind(port, long, 'livez\nlivez\n'), wrong)
    const post405 = 'POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n'
    await assertReplies(port, {
      'PROXY TCP5 127.0.0.1 10.0.0.5 1 2\r\nlivez\n': wrong,
      'PROXY TCP4 localhost example.com 1 2\r\nlivez\n': wrong,
      'PROXY TCP4 127.0.0.1 10.0.0.5 1 2\nlivez\n': wrong,
      [`PROXY UNKNOWN ${'f'.repeat(92)}\r\nlivez\n`]: wrong,
      [`PROXY TCP4 ${'1'.repeat(200)}`]: wrong,
      'PROXY / HTTP/1.1\r\nHost: a\r\n\r\n': wrong,
      [post405]: /^HTTP\/1\.1 405 /,
      [`\r\n\r\n${post405}`]: /^HTTP\/1\.1 405 /,
      'POST letter\n': 'posted letter\n',
      'PROXY\n': 'posted undefined\n',
      '\r\n\r\nlivez\r\n': 'Alive\n',
      '\r\n\r\n\0\r\nQUITE\nlivez\r\n': /^Invalid command ' '\n/
    })
    // Half-closed within a header: what has come is a line.
    const halves = {
      PROXY: 'posted undefined\n',
      'PROXY TCP4 127.0.0.1': 'posted TCP4\n',
      '\r\n\r\n\0\r\nQU': /^Invalid command ' '\n/
    }
    await assertReplies(port, halves, { end: true })
  })
})

// --- The wire: lines -----------------------------------------------------------------------------

const MIB = 1_048_576

/** Whether the other side has reset a connection that nobody has read from. By its first write, since
 *  Node.js 20 and 22 show a reset behind unread data as an end. */
async function isReset(socket: net.Socket): Promise<boolean> {
  socket.on('error', () => {})
  const error = await new Promise<Error | null | undefined>((resolve) => {
    socket.write('\n', resolve)
  })
  socket.destroy()
  return error instanceof Error
}

describeInProcess('The wire: lines', TOGETHER, () => {
  test('every row of the protocol is answered byte for byte, commands one after the other to the end of each, also of a half-closed peer; a line of 4,096 bytes is a command, a longer one is refused and closed', async (t) => {
    const invalid = 'Invalid command \'nope\'\nTry "help".\n'
    const line = (bytes: number) => 'health_check'.padEnd(bytes)
    const slow: Command = async (connection, name) => {
      connection.write(`${name} begins, `)
      await pause(20)
      connection.write(`${name} ends\n`)
    }
    const inTurn = 'a begins, a ends\nb begins, b ends\nOK\nc begins, c ends\n'
    const { monitor, port } = await bootInstance(t)
    monitor.register('slow', '', slow, { http: true })
    await assertReplies(port, {
      'health_check\n': 'OK\n',
      'health_check\r\n': 'OK\n',
      ' \t health_check \t \r\n': 'OK\n',
      'help nope\n': invalid,
      'nope a b\n': invalid,
      'quit\n': 'Goodbye.\n',
      'health_check\nquit\n': 'OK\n', // a connection starts in quit mode
      'interactive\nnope a b\n\nquit\n': `${INTERACTIVE}${invalid}${invalid}Goodbye.\n`,
      'interactive\nhealth_check\n\n\r\n \nquit\n': `${INTERACTIVE}OK\nOK\nOK\nOK\nGoodbye.\n`,
      'interactive\n\nquit\n': `${INTERACTIVE}${INTERACTIVE}Goodbye.\n`,
      '\n\r\n \nquit\n': 'Goodbye.\n', // nothing to repeat yet
      '\nhealth_check\n': 'OK\n',
      'warmup_state\n': '1 0\n',
      'interactive\nslow a\nslow b\nhealth_check\nslow c\nquit\n': `${INTERACTIVE}${inTurn}Goodbye.\n`,
      [`${line(4_096)}\n`]: 'OK\n',
      [`${'é'.repeat(2_048)}\n`]: /^Invalid command/,
      [`${line(4_097)}\n`]: 'Line too long\n',
      [line(4_097)]: 'Line too long\n',
      [`${'é'.repeat(2_048)}x\n`]: 'Line too long\n',
      ['\0'.repeat(9_999)]: 'Line too long\n',
      [`interactive\n${line(4_096)}\n${line(4_097)}\nhealth_check\n`]: `${INTERACTIVE}OK\nLine too long\n`
    })
    // A line without its line feed is ended by the peer's FIN.
    const unended = {
      [line(4_096)]: 'OK\n',
      quit: 'Goodbye.\n',
      '': '',
      '\n': '',
      'interactive\nhealth_check': `${INTERACTIVE}OK\n`,
      'slow a\n': 'a begins, a ends\n',
      'slow b': 'b begins, b ends\n',
      [headOf('/slow/c')]: /^HTTP\/1\.1 200 OK\r\n[^]*\r\n\r\nc begins, c ends\n$/
    }
    await assertReplies(port, unended, { end: true })
  })

  test('the next line or request waits until the last reply has been taken; 1 MiB may be left unsent, with more the client is cut off, by a reset that no end looks like', async (t) => {
    let calls = 0
    let written = 0
    const write: Command = (connection, ...sizes) => {
      calls++
      for (const bytes of sizes) connection.write('x'.repeat(Number(bytes)))
    }
    const endless: Command = async (connection) => {
      for (written = 0; written < 64 * MIB; written += MIB / 16) {
        connection.write('x'.repeat(MIB / 16))
        if (written % MIB === 0) await nextTurn()
      }
    }
    const { monitor, port } = await bootInstance(t, { performers: WARM })
    monitor.register('write', '', write, { http: true })
    monitor.register('endless', '', endless, { http: true })
    const askPaused = (text: string) => {
      const socket = connectTo(port, {}).pause()
      t.after(() => socket.destroy())
      socket.write(text)
      return socket
    }

    const lines = `interactive\n${'write 1000000\n'.repeat(100)}quit\n`
    for (const text of [lines, headOf('/write/1000000').repeat(100)]) {
      calls = 0
      const socket = askPaused(text)
      await until(() => calls > 0, 'the first one is answered')
      for (let turn = 0; turn < 10; turn++) await untilSeen(port)
      assert.ok(calls < 25, `${calls} replies, none of them taken`)
      const taken = await readAll(socket)
      assert.equal(calls, 100)
      const replies = taken.replaceAll('x'.repeat(1_000_000), '')
      if (text === lines) assert.equal(replies, `${INTERACTIVE}Goodbye.\n`)
      assert.equal(taken.length - replies.length, 100_000_000)
    }

    assert.equal((await ask(port, `write ${MIB} 1\n`)).length, MIB + 1)
    assert.equal((await getPage(port, `/write/${MIB}/1`)).body.length, MIB + 1)
    for (const text of ['endless\n', headOf('/endless')]) {
      written = 0
      const socket = askPaused(text)
      await until(() => written >= 64 * MIB, 'the command has ended')
      assert.equal(await isReset(socket), true, text)
    }
    const sockets = [`write ${8 * MIB}\n`, headOf(`/write/${8 * MIB}`)].map(askPaused)
    await untilSeen(port)
    await monitor.stop()
    for (const socket of sockets) assert.equal(await isReset(socket), true)
  })
})

describeInProcess('The wire: lines', ALONE, () => {
  test('interactive mode bears 15 minutes of silence, not less and not more; in it no reply waits until the client acknowledges the one before, and bare line feeds that repeat a command take a small share of the time', async (t) => {
    const timers = takeTimers(t)
    const set = t.mock.method(net.Socket.prototype, 'setNoDelay').mock
    const { port } = await bootInstance(t, { performers: WARM })
    const talk = await converse(t, port)
    const silent = await converse(t, port)
    for (const peer of [talk, silent]) {
      peer.say('interactive\n')
      await peer.hear(INTERACTIVE)
    }
    const ofServer = set.calls.filter((call) => (call.this as net.Socket).localPort === port)
    assert.equal(ofServer.length, 2)

    timers.pass(15 * 60_000 - 1_000)
    talk.say('health_check\n')
    await talk.hear('OK\n')
    assert.equal(silent.isClosed, false)
    timers.pass(2_000)
    await until(() => silent.isClosed, 'it is cut off')
    timers.pass(15 * 60_000 - 3_000)
    talk.say(`livez\n${'\n'.repeat(20_000)}`)
    await until(() => talk.transcript.includes('Alive'), 'the command is answered')
    talk.transcript = ''
    await pause(500)
    const replies = talk.transcript.split('Alive').length - 1
    assert.ok(replies > 16 && replies < 2_000, `${replies} in 500 ms`)
  })

  test('a command has 30 s to answer, over lines for each word, not less; then its time-out is told and closed; who takes a long reply has 30 s for it, and is reset after that', async (t) => {
    const timers = takeTimers(t)
    const finish: (() => void)[] = []
    let report = () => {}
    const { monitor, port } = await bootInstance(t, { performers: WARM })
    const slow: Command = async (connection) => {
      report = () => connection.write('so far\n')
      await new Promise<void>((resolve) => finish.push(resolve))
      connection.write('done\n')
    }
    monitor.register('slow', '', slow, { http: true })
    const begin = async (text: string) => {
      const before = finish.length
      const peer = await converse(t, port)
      peer.say(text)
      await until(() => finish.length > before, 'it runs')
      return peer
    }
    const quick = await begin('slow\n')
    const late: [Peer, RegExp][] = [
      [await begin('slow\n'), /^Error: slow timed out\n$/],
      [await begin('interactive\nslow\nquit\n'), /exit\.\nError: slow timed out\n$/i],
      [await begin(headOf('/slow')), /^HTTP\/1.1 500 [^]+\r\n\r\nso far\nError: slow timed out\n$/]
    ]
    timers.pass(15_000)
    report()
    timers.pass(14_000)
    finish[0]!()
    await until(() => quick.isClosed, 'it is answered')
    assert.equal(quick.transcript, 'done\n')
    assert.ok(late.every(([peer]) => !peer.isClosed))
    timers.pass(2_000)
    await until(() => late.every(([peer]) => peer.isClosed), 'they are closed')
    finish.forEach((each) => each())
    await untilSeen(port)
    for (const [peer, reply] of late) assert.match(peer.transcript, reply)

    const reporter = await begin('slow\n')
    for (let time = 0; time < 4; time++) {
      timers.pass(29_000)
      report()
      await reporter.hear('so far\n')
    }
    timers.pass(31_000)
    await reporter.hear('Error: slow timed out\n')

    const large = 'x'.repeat(8 * MIB) // more than the kernel's buffers hold
    monitor.register('large', '', (connection) => connection.write(large), { http: true })
    const askAndLet = async (text: string, ms: number) => {
      const socket = connectTo(port, {}).pause()
      socket.write(text)
      await untilSeen(port)
      timers.pass(ms)
      return socket
    }
    const page = headOf('/large', 'Connection: close')
    for (const text of ['large\n', 'interactive\nlarge\nquit\n', page]) {
      const taken = await readAll(await askAndLet(text, 29_000))
      assert.ok(taken.includes(large), `${taken.length} bytes of ${text}`)
      assert.equal(await isReset(await askAndLet(text, 31_000)), true, text)
    }
  })

  test('a line, a head of HTTP and a PROXY header have 60 s to come, not less, and not more for coming in drops; a peer that does not close after us is closed after 5 s, not earlier', async (t) => {
    const timers = takeTimers(t)
    const { port } = await bootInstance(t, { performers: WARM })
    const head = 'GET /health_check HTTP/1.1\r\nHost: a\r\nConnection: close\r\n'
    const headers = Object.values(PROXY_HEADERS)
    /** What comes at first, and after 59 s; what is answered, and whether by then. */
    type Row = [first: string | Buffer, more: string, reply: RegExp, isInTime?: boolean]
    const rows: Row[] = [
      ['', 'health_check\n', /^OK\n$/, true],
      ['', '', /^$/],
      ['health', '_chec', /^$/],
      [head, '\r\n', /^HTTP\/1.1 200 OK\r\n/, true],
      [head, 'X: a\r\n', /^$/],
      ['GET /health_check HT', 'TP/1.1\r\n', /^$/],
      [`${headOf('/livez')}GET / HTTP/1.1\r\nHo`, 'X', /^HTTP\/1\.1 200 OK\r\n.*\r\n\r\nAlive\n$/s],
      ...headers.map((header): Row => [header, '', /^$/]),
      ...headers.map((header): Row => [header.subarray(0, -1), '', /^$/])
    ]
    const connect = async ([first, more, reply, isInTime = false]: Row) => {
      const peer = await converse(t, port)
      peer.socket.write(first)
      return { peer, more, reply, isInTime }
    }
    const all = await Promise.all(rows.map(connect))
    await untilSeen(port)
    timers.pass(59_000)
    for (const { peer, more } of all) peer.socket.write(more)
    await until(() => all.every(({ peer, isInTime }) => peer.isClosed || !isInTime), 'those answer')
    await untilSeen(port)
    for (const { peer, isInTime } of all) assert.equal(peer.isClosed, isInTime)
    timers.pass(2_000)
    await until(() => all.every(({ peer }) => peer.isClosed), 'the others are cut off')
    for (const { peer, reply } of all) assert.match(peer.transcript, reply)

    const peers: Peer[] = []
    for (const text of ['health_check\n', ' '.repeat(9_999)]) {
      const peer = await converse(t, port, { allowHalfOpen: true })
      peer.socket.write(text)
      await once(peer.socket, 'end')
      peers.push(peer)
    }
    const sendMore = async () => {
      for (const { socket } of peers) socket.write('more')
      await untilSeen(port)
      return peers.map(({ isClosed }) => isClosed)
    }
    timers.pass(4_000)
    await sendMore() // what a closed one is sent makes it known only to the next
    assert.deepEqual(await sendMore(), [false, false])
    timers.pass(2_000)
    await until(async () => (await sendMore()).every(Boolean), 'they are closed')
  })
})

// --- The wire: HTTP ------------------------------------------------------------------------------

describeInProcess('The wire: HTTP', TOGETHER, () => {
  test('over HTTP the verdict is 200 or 503, help and livez 200 in every state, and nothing cached; HEAD has no body, other methods get 405', async (t) => {
    let connected = true
    const gate = latch()
    const { monitor, port } = await bootInstance(t, {
      performers: { '/': () => gate.opened },
      databases: { main: { isConnected: () => connected } },
      until: 'started'
    })
    const askBoth = async (path: string, options: PageOptions = {}) => {
      const get = await getPage(port, path, options)
      const head = await getPage(port, path, { ...options, method: 'HEAD' })
      assert.deepEqual([head.status, head.body], [get.status, ''])
      assert.equal(get.headers['content-type'], 'text/plain; charset=utf-8')
      assert.equal(get.headers['cache-control'], 'no-store')
      assert.equal(get.headers['x-content-type-options'], 'nosniff')
      const { date: _, ...headers } = get.headers
      assert.deepEqual({ ...head.headers, ...headers }, head.headers)
      return `${get.status} ${get.body}`
    }
    const help = await ask(port, 'help\n')
    assert.doesNotMatch(help, /page|readyz|livez/)
    const expectVerdict = async (verdict: string) => {
      for (const path of ['/health_check', '/readyz']) assert.equal(await askBoth(path), verdict)
      assert.equal(await askBoth('/livez'), '200 Alive\n')
      assert.match(await askBoth('/nope'), /^404 /)
      for (const headers of [{}, { Accept: '*/*' }, { Accept: 'application/json' }]) {
        assert.equal(await askBoth('/', { headers }), `200 ${help}`, verdict)
      }
    }
    await expectVerdict('503 Warmup in progress\n')
    gate.open()
    await untilVerdict(monitor)
    await expectVerdict('200 OK\n')
    connected = false
    await expectVerdict("503 Error: Database 'main' disconnected.\n")
    void monitor.drain()
    await expectVerdict('503 Draining\n')

    for (const method of ['POST', 'PUT', 'DELETE', 'PATCH', 'OPTIONS', 'TRACE', 'PROPFIND']) {
      const { status, headers } = await getPage(port, '/health_check', { method })
      assert.equal(status, 405, method)
      assert.deepEqual(headers.allow?.split(/, */).sort(), ['GET', 'HEAD'])
    }
  })

  test('GET runs a command that is offered over HTTP, its arguments percent-decoded, and no other; the target may be absolute', async (t) => {
    let calls = 0
    const count: Command = () => {
      calls++
    }
    const echo: Command = (connection, ...words) => {
      connection.write(words.map((word) => `<${word}>`).join(''))
    }
    const { monitor, port } = await bootInstance(t)
    monitor.register('own', 'Own', count)
    monitor.register('near', 'Near', count, { local: true })
    monitor.register('echo', 'Echo', echo, { http: true })
    monitor.register('größe', 'Size', (connection) => connection.write('XL'), { http: true })
    const replies: Record<string, RegExp> = {
      '/echo/a%20b/%C3%BC%2F/c': /\r\n\r\n<a b><ü\/><c>$/,
      '/gr%C3%B6%C3%9Fe': /\r\n\r\nXL$/,
      '/help/echo': /\r\n\r\nHelp for echo:\n\nEcho\n/,
      'HTTP://elsewhere:8160/health_check': /^HTTP\/1\.1 200 [^]+\r\n\r\nOK\n$/,
      'https://[::1]:8160/echo/a/b%20c?d': /\r\n\r\n<a><b c>$/,
      'http://localhost:8160': /\r\n\r\nSupported commands:\n/,
      'http://localhost:8160?pause': /\r\n\r\nSupported commands:\n/,
      'http://localhost:8160/drain': /^HTTP\/1\.1 404 /,
      'ftp://localhost/health_check': /^HTTP\/1\.1 404 /
    }
    for (const [target, reply] of Object.entries(replies)) {
      assert.match(await ask(port, headOf(target, 'Connection: close')), reply, target)
    }
    assert.match(await ask(port, 'GET /echo/a HTTP/1.0\r\n\r\n'), /^HTTP\/1\.1 200 [^]+<a>$/)

    const offered = 'health_check agent_check metrics warmup_state monitor perf_metrics'
    const others =
      'own near drain drain/now %64rain /drain resume quit interactive nope HEALTH_CHECK ' +
      'constructor __proto__ health_check%2F % %ff favicon.ico'
    for (const [status, names] of Object.entries({ 200: offered, 404: others })) {
      for (const name of names.split(' ')) {
        assert.equal((await getPage(port, `/${name}`)).status, Number(status), name)
      }
    }
    assert.equal(calls, 0)
    assert.equal(await ask(port, 'health_check\n'), 'OK\n')
  })

  test('a connection answers a hundred requests, also of more that are pipelined; between two the host has its turn', async (t) => {
    let turn = 0
    const countTurns = () => {
      turn++
      immediate = setImmediate(countTurns)
    }
    let immediate = setImmediate(countTurns)
    t.after(() => clearImmediate(immediate))
    const turns = new Set<number>()
    const note: Command = (connection) => {
      turns.add(turn)
      connection.write('noted\n')
    }
    const { monitor, port } = await bootInstance(t, { performers: WARM })
    monitor.register('note', '', note, { http: true })
    for (const count of [3, 99, 100, 101, 150, 1_000]) {
      turns.clear()
      const last = count < 100 ? headOf('/note', 'Connection: close') : headOf('/note')
      const reply = await ask(port, headOf('/note').repeat(count - 1) + last)
      const heads = reply.match(/HTTP\/1\.1 200 OK\r\n/g)?.length
      const answers = reply.match(/\r\n\r\nnoted\n/g)?.length
      const expected = Math.min(count, 100)
      assert.deepEqual([heads, answers, turns.size], [expected, expected, expected])
      assert.equal(reply.match(/\r\nConnection: close\r\n/g)?.length, 1, `${count} requests`)
    }
  })

  test('a head of HTTP is held to the limit of Node.js, its request line included, and not taken for a line', async (t) => {
    const { port } = await bootInstance(t, { performers: WARM })
    const head = (path: string, header: string) => headOf(path, 'Connection: close', `X: ${header}`)
    const limit = http.maxHeaderSize
    const long = (bytes: number) => 'a'.repeat(bytes)
    const statuses: [text: string, status: number][] = [
      [head('/health_check', long(limit - 1_000)), 200],
      [head(`/${long(limit - 1_000)}`, ''), 404],
      [head('/health_check', long(limit)), 431],
      [head(`/${long(limit)}`, ''), 431],
      [head(`/${long(limit / 2)}`, long(limit / 2)), 431],
      [`GET /${long(limit + 1)}`, 431]
    ]
    for (const [text, status] of statuses) {
      for (const firstBytes of [text.length, 4_000, 9_000]) {
        const peer = await converse(t, port)
        peer.say(text.slice(0, firstBytes))
        await untilSeen(port) // so that it comes in two parts
        peer.say(text.slice(firstBytes))
        await until(() => peer.transcript !== '', 'it is answered')
        assert.match(peer.transcript, new RegExp(`^HTTP/1\\.1 ${status} `))
      }
    }
  })
})

// --- The module ----------------------------------------------------------------------------------

type UnmodifiedSetup = Pick<ProcessSetup, 'env' | 'flags' | 'under'> & { file?: string }

/** A program that knows nothing of the monitor, which begins by itself in there; it may `await`. */
function runUnmodified(t: TestContext, source: string, setup: UnmodifiedSetup = {}) {
  const { flags = [], under = [], file = MODULE.href } = setup
  const env = {
    FTW_MONITOR: 'auto',
    NODE_OPTIONS: ['--no-warnings', `--import=${file}`, ...flags].join(' '),
    ...setup.env
  }
  const script = `${PRINT}\nconst main = async () => {\n${source}\n}\nmain()`
  const [program = '', ...words] = under.concat(process.execPath, '-e', script)
  return watch(t, program, words, { env })
}

/** An instance that is such a program, when it is in service. */
async function bootUnmodified(t: TestContext, source: string, setup: UnmodifiedSetup = {}) {
  const port = await freePort()
  const env = { PORT: String(port), ...setup.env }
  const watched = runUnmodified(t, source, { ...setup, env })
  await untilHealthy(port + 80)
  return { watched, port, monitorPort: port + 80 }
}

const PLAIN_SERVER = `
  const http = require('node:http')
  const server = http.createServer(({ url }, response) => {
    const [, ms = 0] = /^\\/slow(\\d+)$/.exec(url) ?? []
    setTimeout(() => response.end('served'), ms)
  })
  server.on('listening', () => print('listens', server.address().port))
  server.listen(process.env.PORT ?? 0, '127.0.0.1')`

/** Tells who listens for signals, and how many sockets and servers are open. */
const TELL_OF_TRACES = `
  const traces = () => {
    const listeners = ['SIGTERM', 'SIGINT'].map((name) => process.listenerCount(name))
    const open = process.getActiveResourcesInfo().filter((kind) => /TCP|Pipe.*Server/.test(kind))
    return JSON.stringify({ listeners, open, isEmitOwn: Object.hasOwn(process, 'emit') })
  }`

/** Imports a copy, and requires another one where it is compiled. */
const REQUIRED = `require(${JSON.stringify(fileURLToPath(new URL('monitor.cjs', MODULE)))})`
const IMPORTED = `await import('${MODULE.href}?copy=other')`
const TWO_COPIES = `
  const { setTimeout: pause } = require('node:timers/promises')
  const one = await import('${MODULE.href}?copy=one')
  const other = ${EXTENSION === '.js' ? REQUIRED : IMPORTED}`

describeProcesses('The module', SIDE_BY_SIDE, () => {
  test('with FTW_MONITOR=auto a program with a signal listener of its own ends in its way, and loses nothing', async (t) => {
    const source = `${PLAIN_SERVER}
      process.on('SIGTERM', () => server.close(() => process.exit(7)))`
    const env = { FTW_MONITOR_TIMEOUT_MS: '2500', HOST: '127.0.0.1' }
    const { watched, port } = await bootUnmodified(t, source, { env })
    const page = getPage(port, '/slow1000')
    await endUnderLoad(t, watched, { port, path: '/slow10' })
    assert.equal((await page).body, 'served')
    assert.equal(await watched.exit, 7, watched.output)
    assert.deepEqual(linesOfShutdown(watched.output), [])
  })

  test('with FTW_MONITOR=auto the first process of a container, which the kernel spares, loses nothing, and ends with the status of the signal', async (t) => {
    const words = ['-Urpf', '--kill-child']
    const { status } = spawnSync('unshare', [...words, 'true'])
    if (status !== 0) return t.skip('this user may not make processes of its own (unshare -Urpf)')
    const endOne = async (signal: NodeJS.Signals, expected: number) => {
      const source = `print('process', process.pid)\n${PLAIN_SERVER}`
      const under = ['unshare', ...words]
      const { watched, port, monitorPort } = await bootUnmodified(t, source, { under })
      assert.match(watched.output, /^process 1$/m)
      const { pid } = watched.child
      const own = fs.readFileSync(`/proc/${pid}/task/${pid}/children`, 'utf8')
      const page = getPage(port, '/slow500')
      await until(async () => (await askPerfMetrics(monitorPort)).http.in_flight === 1, 'it came')
      process.kill(Number(own), signal)
      assert.equal((await page).body, 'served')
      assert.equal(await inTime(watched.exit, 'it ends'), expected, watched.output)
    }
    await Promise.all([endOne('SIGTERM', 143), endOne('SIGINT', 130)])
  })

  test('with FTW_MONITOR=auto nothing is done in a program that serves no HTTP, and in its child processes, and in a worker thread but to say so', async (t) => {
    const port = await freePort()
    const file = join(scratchFolder(t), 'worker.cjs')
    const end = `
      server.on('listening', () => {
        setTimeout(() => http.createServer(() => {}).listen(0), 100)
        setTimeout(() => process.exit(), 500)
      })`
    fs.writeFileSync(file, `${PRINT}\n${PLAIN_SERVER}\n${end}`)
    const source = `${TELL_OF_TRACES}
      const { spawnSync } = require('node:child_process')
      const { once } = require('node:events')
      const { Worker } = require('node:worker_threads')
      const server = require('node:net').createServer().listen(0, '127.0.0.1')
      await once(server, 'listening')
      await new Promise((resolve) => server.close(resolve))
      await new Promise((resolve) => setTimeout(resolve, 300))
      print(traces())
      const child = spawnSync(process.execPath, ['-e', 'console.log("child")'])
      print(String(child.stdout) + String(child.stderr) + 'of a child')
      await once(new Worker(${JSON.stringify(file)}), 'exit')
      print('worker is over')`
    const env = { PORT: String(port) }
    const watched = runUnmodified(t, source, { env })
    assert.equal(await inTime(watched.exit, 'it ends'), 0, watched.output)
    const traces = '{"listeners":[0,0],"open":[],"isEmitOwn":false}\n'
    assert.equal(watched.stdout, `${traces}child\nof a child\nlistens ${port}\nworker is over\n`)
    const line = `does nothing for the server at 127.0.0.1:${port}, since it is in a worker thread`
    const advice = 'only the program itself can start() one there'
    assert.equal(watched.stderr, `ftw-monitor ${line}: ${advice}\n`)
  })

  test('with FTW_MONITOR=auto a server that listens elsewhere than PORT is told of once, if none listens at PORT', async (t) => {
    for (const msUntilServer of [1_000, 0]) {
      const source = `
        for (let count = 0; count < 2; count++) {
          const other = require('node:http').createServer(() => {})
          other.listen(0, '127.0.0.1', () => print('elsewhere', other.address().port))
        }
        await new Promise((resolve) => setTimeout(resolve, ${msUntilServer}))
        ${PLAIN_SERVER}`
      const flags = [flagForTimeouts(10_000)]
      const { watched, port } = await bootUnmodified(t, source, { flags })
      await pause(300)
      const [, elsewhere] = /^elsewhere (\d+)$/m.exec(watched.output) ?? []
      const warning = `finds no server at PORT=${port}, but one at 127.0.0.1:${elsewhere}`
      const told = watched.output.match(/finds no server.*?:\d+/g)
      assert.deepEqual(told, msUntilServer > 0 ? [warning] : null)
    }
  })

  test('a word that FTW_MONITOR does not know costs a warning', async (t) => {
    const values = 'it is auto, or 0, false, no or off'
    for (const word of ['AUTO', 'off', ' ', 'autp', '1', 'on']) {
      const isKnown = ['AUTO', 'off', ' '].includes(word)
      const stderr = isKnown ? '' : `ftw-monitor cannot use FTW_MONITOR=${word}: ${values}\n`
      const watched = runUnmodified(t, '', { env: { FTW_MONITOR: word } })
      assert.equal(await inTime(watched.exit, 'it ends'), 0, watched.output)
      assert.deepEqual([watched.stdout, watched.stderr], ['', stderr])
    }
  })

  test('all copies in a process are one, by each function that is exported: what begins by itself is started, told, drained and stopped by any', async (t) => {
    const source = `${PLAIN_SERVER}
      ${TELL_OF_TRACES}
      ${TWO_COPIES}
      const functionsOf = (all) => {
        return Object.keys(all).filter((name) => typeof all[name] === 'function').sort().join()
      }
      const left = globalThis[Symbol.for('ftw-monitor.exports.1')]
      print('all of them:', functionsOf(left) === functionsOf(one))
      while (!(await one.health()).healthy) await pause(20)
      one.registerDatabase('main', { isConnected: () => true }).loads(3)
      one.registerWarmup('/shop', () => {})
      other.register('echo', '', (peer, word) => peer.write(word), { http: true })
      other.registerMetrics(() => 'own_metric 1')
      const address = await one.start(server)
      const again = await other.start({ server: [server] })
      await other.untilHealthy()
      process.once('SIGUSR2', async () => {
        void other.drain({ reason: 'Moving house' })
        print((await one.health()).reason)
        await other.stop()
        server.close()
        print(traces())
      })
      print('address', address.port, again.port)`
    const { watched, monitorPort } = await bootUnmodified(t, source)
    await until(() => watched.output.includes('address'), 'start() has an address')
    assert.match(watched.output, new RegExp(`^address ${monitorPort} ${monitorPort}$`, 'm'))
    assert.match(watched.output, /^all of them: true$/m)
    assert.equal(await ask(monitorPort, 'echo hello\n'), 'hello')
    const { body } = await getPage(monitorPort, '/metrics')
    assert.match(body, /own_metric 1/)
    assert.match(body, /database="main"/)
    assert.match(await ask(monitorPort, 'status\n'), /\/shop +warm/)
    assert.doesNotMatch(watched.output, /already|EADDRINUSE/)
    assert.equal(watched.output.match(/listening on/g)?.length, 1)

    watched.child.kill('SIGUSR2')
    assert.equal(await inTime(watched.exit, 'it ends'), 0, watched.output)
    assert.match(watched.output, /^Moving house\n[^]*"listeners":\[0,0\].*"isEmitOwn":false/m)
  })

  test('a program that starts its server with options gets these, whenever it does, and ends by the signal', async (t) => {
    const listens = "server.listen(process.env.PORT, '127.0.0.1')"
    const scripts = [
      `const started = one.start({ server, listen })
      ${listens}
      await started`,
      `${listens}
      while (!(await one.health()).healthy) await pause(20)
      await pause(500)
      await one.start({ server, listen })`
    ]
    for (const script of scripts) {
      const listen = await freePort()
      const port = await freePort()
      const source = `${TWO_COPIES}
        const server = require('node:http').createServer((_, response) => response.end('served'))
        const listen = { host: '127.0.0.1', port: ${listen} }
        ${script}`
      const watched = runUnmodified(t, source, { env: { PORT: String(port) } })
      await untilHealthy(listen)
      assert.ok(await isRefused(port + 80))
      assert.doesNotMatch(watched.output, /already/)
      watched.child.kill('SIGTERM')
      await watched.exit
      assert.equal(watched.child.signalCode, 'SIGTERM')
      assert.match(watched.output, /shuts down after SIGTERM/, 'FTW_MONITOR=auto delays the signal')
    }
  })

  test('a first copy of another version, or without all that the later one has, is warned of once, by its file and version', async (t) => {
    const rows: [text: RegExp, replaced: string, versions: RegExp][] = [
      [/'\d+\.\d+\.\d+'/, "'0.9.0'", /0\.9\.0.*1\.0\.0/],
      [/shared\(\s*'untilHealthy'/, "shared('untilWell'", /1\.0\.0.*1\.0\.0/]
    ]
    for (const [text, replaced, versions] of rows) {
      const folder = scratchFolder(t)
      fs.writeFileSync(join(folder, 'package.json'), '{ "type": "module" }')
      const file = join(folder, `first${EXTENSION}`)
      fs.writeFileSync(file, fs.readFileSync(PROGRAM, 'utf8').replace(text, replaced))
      const source = `
        const first = await import(${JSON.stringify(file)})
        const later = await import('${MODULE.href}')
        first.registerDatabase('main', { isConnected: () => true })
        print((await later.status()).databases.length, await later.untilHealthy?.())`
      const env = { FTW_MONITOR: '0', NODE_OPTIONS: '--no-warnings' }
      const watched = runUnmodified(t, source, { env })
      assert.equal(await inTime(watched.exit, 'it ends'), 0, watched.output)
      assert.equal(watched.stdout, '1 \n')
      const [line = '', ...others] = watched.stderr.trimEnd().split('\n')
      assert.deepEqual(others, [])
      for (const part of [file, PROGRAM]) assert.ok(line.includes(part), line)
      assert.match(line, versions)
    }
  })

  test('preloaded into a program and switched off, it answers at the health path alone, if there is one', async (t) => {
    const tell = 'process.once("SIGTERM", () => { print(traces()); process.exit(3) })'
    const source = `${TELL_OF_TRACES}\n${PLAIN_SERVER}\n${tell}`
    for (const [healthPath, answer] of Object.entries({ '': 'served', '/ready': 'OK\n' })) {
      const port = await freePort()
      const env = { PORT: String(port), FTW_MONITOR: 'off', FTW_MONITOR_HEALTH_PATH: healthPath }
      const watched = runUnmodified(t, source, { env })
      await until(() => watched.stdout.includes('listens'), 'it listens')
      assert.equal((await getPage(port, '/ready?now')).body, answer)
      assert.equal((await getPage(port, '/@@warmup')).body, 'served')
      assert.ok(await isRefused(port + 80))
      watched.child.kill()
      assert.equal(await inTime(watched.exit, 'it ends'), 3)
      assert.match(watched.stdout, /"listeners":\[0,0\]/)
      assert.equal(watched.stderr, '')
    }
  })

  test('a copy called ftw-monitor.mjs can be preloaded anywhere, and is the program, too', async (t) => {
    if (EXTENSION !== '.js') return t.skip('it is compiled')
    const folder = scratchFolder(t)
    const file = join(folder, 'ftw-monitor.mjs')
    fs.copyFileSync(PROGRAM, file)
    fs.writeFileSync(join(folder, 'package.json'), '{ "type": "commonjs" }')
    const { port } = await bootUnmodified(t, PLAIN_SERVER, { file })
    const words = ['health_check', '--port', String(port)]
    const env = { HOST: '127.0.0.1', FTW_MONITOR: 'auto', NODE_OPTIONS: `--import=${file}` }
    const result = await runToEnd(t, process.execPath, programWords(words, file), { env })
    assert.deepEqual(result, { status: 0, stdout: 'OK\n', stderr: '' })
  })
})

// --- Never worse than without us -----------------------------------------------------------------

// Whatever a program does without us, it does with us; it only does it later, or better. So most of
// these programs are lived several times: without us, with FTW_MONITOR=auto, and with calls of their
// own. Compared are how they ended, what they said on the way, and what became of a request.

type Way = 'alone' | 'auto' | 'in code'

const WITH_US: Way[] = ['auto', 'in code']

/** For ends that must not take all the time there is: 1.5 s for requests, 4.5 s in all. */
const SHORT = { FTW_MONITOR_TIMEOUT_MS: '1500' }

/** Boots a program in one of the ways. It has what comes first here, and may replace `server`,
 *  `handle`, `options`, `begin`, which does nothing unless in code, and `listen`. A request after
 *  `cleanUp` is answered `closed`. */
function startLife(t: TestContext, way: Way, program: string, setup: ProcessOptions = {}) {
  const source = `
    import { once } from 'node:events'
    import http from 'node:http'
    import { setTimeout as pause } from 'node:timers/promises'
    ${PRINT}

    ${OPEN_UNTIL_CLEANED}
    let handle = async ({ url }, response) => {
      print('asked for', url)
      const [, kind, ms] = /^\\/(slow|block)(\\d+)$/.exec(url) ?? []
      if (kind === 'slow') await pause(Number(ms))
      if (kind === 'block') Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, Number(ms))
      response.end(isOpen ? 'served' : 'closed')
    }
    let server = http.createServer((request, response) => handle(request, response))
    let listen = async () => {
      server.listen(LOOPBACK)
      await once(server, 'listening')
    }
    const options = {}
    const isInCode = ${way === 'in code'}
    const monitor = isInCode ? await import(${JSON.stringify(MODULE.href)}) : undefined
    let begin = async () => {
      monitor?.shutdownOnSignal(options)
      await monitor?.start(server)
    }
    ${program}
    await listen()
    await begin()
    print('ready', server.address()?.port ?? 0)`
  const quiet = { FTW_MONITOR_AUTOWARMUP: '0', FTW_MONITOR_LISTEN: '127.0.0.1:0' }
  const env: Record<string, string> = { ...quiet, ...setup.env }
  const words = ['--no-warnings', '--input-type=module', '-e', source]
  if (way === 'auto') {
    env['FTW_MONITOR'] = 'auto'
    words.unshift(`--import=${MODULE.href}`)
  }
  const watched = watch(t, process.execPath, words, { ...setup, env })
  const hasSaid = (text: string) => {
    return until(() => watched.output.includes(text), `${text}, ${way}, in: ${watched.output}`)
  }
  /** Waits until it is ready, and gives its port. */
  const isReady = async () => {
    const readyLine = /^ready (\d+)$/m
    const isThere = () => {
      assert.equal(watched.child.exitCode, null, watched.output)
      return readyLine.test(watched.output)
    }
    await until(isThere, `the program is ready, ${way}`)
    if (way === 'auto') await hasSaid('ftw-monitor listening on')
    return Number(readyLine.exec(watched.output)?.[1])
  }
  /** Waits for its end: what it said itself since it was ready, but the requests that came. */
  const awaitEnd = async () => {
    const startedAt = performance.now()
    await inTime(watched.exit, `it ends, ${way}, after ${watched.output}`)
    const { exitCode, signalCode } = watched.child
    const lines = watched.output.replace(/^[^]*^ready.*\n/m, '').split('\n')
    const said = lines.filter((line) => line !== '' && !/^(ftw-monitor|asked for) /.test(line))
    return { exitCode, signalCode, said, ms: performance.now() - startedAt }
  }
  return { watched, way, hasSaid, isReady, awaitEnd }
}

/** Has a program end by a signal while it serves a request: fails unless it ends with us as it does
 *  without us, in about the same time, and the request is served. Returns all that was said with
 *  us. */
async function assertNoWorse(
  t: TestContext,
  program: string,
  setup: ProcessOptions & { ways?: Way[] } = {}
): Promise<string> {
  const { ways = WITH_US, ...others } = setup
  const liveOnce = async (way: Way) => {
    const life = startLife(t, way, program, others)
    const answer = getPage(await life.isReady(), '/slow500').then(({ body }) => body, codeOf)
    await life.hasSaid('asked for /slow500')
    life.watched.child.kill('SIGTERM')
    const { ms, ...end } = await life.awaitEnd()
    return { ms, end, answer: await answer, output: life.watched.output }
  }
  const alone = liveOnce('alone')
  const compare = async (way: Way) => {
    const { end, answer, ms, output } = await liveOnce(way)
    assert.deepEqual({ way, ...end }, { way, ...(await alone).end })
    assert.equal(answer, 'served', way)
    const laterMs = ms - (await alone).ms
    assert.ok(laterMs < 3_000, `${way} it ends ${laterMs} ms later`)
    return output
  }
  return (await Promise.all(ways.map(compare))).join('\n')
}

/** Has a part of a program run at its end: in code by cleanUp, else by a listener of its own. */
const atItsEnd = (cleans: string) => `
  options.cleanUp = async () => {
    ${cleans}
  }
  if (!isInCode) {
    process.on('SIGTERM', async () => {
      await options.cleanUp()
      process.exit()
    })
  }`

/** Programs with an end of their own, or by packages, of which many programs do not even know that
 *  they have them. */
const ENDS: Record<string, string> = {
  'closes its server and all connections, and looks at it meanwhile': `
    let portAtBoot
    server.once('listening', () => {
      portAtBoot = server.address().port
    })
    process.on('SIGTERM', async () => {
      print(server.listening, server.address().port === portAtBoot)
      const closed = once(server.close((error) => print('closed', error?.code)), 'close')
      server.closeAllConnections()
      await closed
      print(server.listening, server.address())
      cleanUp()
      process.exit(4)
    })`,
  'removes the file of its Unix socket itself, and then keeps nothing referenced': `
    const { unlinkSync } = await import('node:fs')
    const { join } = await import('node:path')
    const { tmpdir } = await import('node:os')
    const path = join(tmpdir(), \`life-\${process.pid}\`)
    http.createServer((_, response) => response.end()).listen(path)
    process.on('SIGTERM', () => {
      unlinkSync(path)
      for (const each of process._getActiveHandles()) each.unref?.()
      cleanUp()
    })`,
  'has signal-exit': `
    import { onExit } from 'signal-exit'
    onExit((...args) => void print('exit', JSON.stringify(args)))`,
  'has @godaddy/terminus': `
    import { createTerminus } from '@godaddy/terminus'
    createTerminus(server, { onSignal: async () => cleanUp(), logger: print })`
}

/** A program with a socket that was passed on, as systemd does it. After its server was closed it
 *  cleans up for a while, so that others must serve meanwhile. */
const listensOnSocket = (before = '') => `
  ${atItsEnd('cleanUp()\nawait pause(1_500)')}
  listen = async () => {
    ${before}
    server.listen({ fd: 3 })
    await once(server, 'listening')
  }`

const BURST = 20

/** Fails unless many connections of one moment are accepted at once, or wait in the backlog, and are
 *  served in the end. One that finds the backlog full is tried again by the kernel after a second,
 *  or fails. */
async function assertBurstServed(
  t: TestContext,
  where: number | string,
  onConnected = () => {}
): Promise<void> {
  const startedAt = performance.now()
  const sockets = Array.from({ length: BURST }, () => connectTo(where, {}))
  for (const socket of sockets) {
    t.after(() => socket.destroy())
    socket.write(headOf('/', 'Connection: close'))
  }
  const answers = sockets.map((socket) => readAll(socket).catch(codeOf))
  await inTime(Promise.all(sockets.map((socket) => once(socket, 'connect'))), 'all are connected')
  const ms = performance.now() - startedAt
  assert.ok(ms < 900, `the last is connected after ${ms} ms`)
  onConnected()
  const texts = await inTime(Promise.all(answers), 'all are answered')
  const bodies = texts.map((text) => text.split('\r\n').at(-1))
  assert.deepEqual(bodies, Array(BURST).fill('served'))
}

describeProcesses('Never worse than without us', SIDE_BY_SIDE, () => {
  for (const [what, program] of Object.entries(ENDS)) {
    const [, packageName] = /^has (.*)/.exec(what) ?? []
    const how = packageName === undefined ? {} : needsPackage(packageName)
    test(`a program that ${what} ends as without us`, how, async (t) => {
      await assertNoWorse(t, program, { cwd: PACKAGES ?? '.' })
    })
  }

  test('auto: a SIGINT a second after a SIGTERM gives the program its signals back for good', async (t) => {
    const program = `
      ${TELL_OF_TRACES}
      server.on('request', ({ url }, response) => {
        response.on('finish', () => print('answered', url))
      })
      for (const name of ['SIGTERM', 'SIGINT']) process.on(name, () => print('heard', name))
      process.on('SIGUSR2', () => print(traces()))`
    const { watched, hasSaid, isReady } = startLife(t, 'auto', program)
    const page = getPage(await isReady(), '/slow3000')
    await hasSaid('asked for /slow3000')
    watched.child.kill('SIGTERM')
    await hasSaid('shuts down after SIGTERM')
    await pause(1_100) // sooner it would be the same stop that arrives twice
    watched.child.kill('SIGINT')
    await hasSaid('heard SIGINT')
    assert.equal((await page).body, 'served')
    await hasSaid('shutdown: done') // by then the monitor has looked several times
    watched.child.kill('SIGUSR2')
    await hasSaid('"listeners":[1,1]')
    const told = watched.output.match(/^(heard|answered \/slow).*/gm)
    assert.deepEqual(told, ['heard SIGTERM', 'heard SIGINT', 'answered /slow3000'])
  })

  test('auto: without PORT the first server of HTTP is the instance, gets no request of ours before it has served one, and ends', async (t) => {
    const program = `
      const { default: net } = await import('node:net')
      const other = net.createServer().listen(0, '127.0.0.1')
      handle = ({ url }, response) => {
        print('asked for', url)
        response.end()
        if (url === '/last') for (const each of [other, server]) each.close()
      }`
    const env = { FTW_MONITOR_AUTOWARMUP: '', NODE_OPTIONS: flagForPace(1 / 2) }
    const { watched, isReady, awaitEnd } = startLife(t, 'auto', program, { env })
    const port = await isReady()
    await pause(500)
    await getPage(port, '/first')
    await until(() => watched.output.includes('is warm'), 'it is warm', 1_500)
    await getPage(port, '/last')
    assert.equal((await awaitEnd()).exitCode, 0, watched.output)
    const asked = watched.output.match(/(?<=asked for ).*/g)
    assert.deepEqual(asked, ['/first', '/', '/last'])
  })

  test('auto: a shutdown() that is called while a signal is delayed cleans up after that', async (t) => {
    const program = `
      process.on('SIGTERM', () => print('heard'))
      process.on('SIGUSR2', async () => {
        await globalThis[Symbol.for('ftw-monitor.exports.1')].shutdown({ cleanUp })
        process.exit(6)
      })`
    const life = startLife(t, 'auto', program)
    const answer = getPage(await life.isReady(), '/slow800')
    await life.hasSaid('asked for /slow800')
    life.watched.child.kill('SIGTERM')
    await life.hasSaid('shuts down')
    life.watched.child.kill('SIGUSR2')
    assert.equal((await answer).body, 'served')
    const { exitCode, said } = await life.awaitEnd()
    assert.deepEqual([exitCode, said.sort()], [6, ['cleaned up', 'heard']])
  })

  test('a job that a signal listener finishes is not cut, has some seconds however short exitAfterMs is, and in auto the log tells that it takes long', async (t) => {
    const finishes = `
      process.on('SIGTERM', async () => {
        server.close()
        await pause(2_200)
        print('finished')
        process.exit(7)
      })`
    // The monitor's timeouts of seconds pass ten times as fast; the program's come by node:timers.
    const source = `
      const timeout = setTimeout
      globalThis.setTimeout = (act, ms, ...rest) => timeout(act, ms < 3_000 ? ms : ms / 10, ...rest)`
    const quick = { NODE_OPTIONS: `--import=data:text/javascript,${encodeURIComponent(source)}` }
    const output = await assertNoWorse(t, finishes, { ways: ['auto'], env: { ...SHORT, ...quick } })
    const lines = output.match(/^ftw-monitor .*SIGTERM.*$/gm) ?? []
    assert.equal(lines.length, 2, output) // the other one says that it shuts down

    await assertNoWorse(t, finishes, { ways: ['in code'], env: quick })
    const short = `${finishes}
      options.timeoutMs = 1_000
      options.exitAfterMs = 1_100`
    await assertNoWorse(t, short, { ways: ['in code'] })
  })

  for (const way of WITH_US) {
    test(`${way}: a look-up that hangs of a name in FTW_MONITOR_LISTEN holds no end up`, async (t) => {
      const program = `
        const { default: dns } = await import('node:dns')
        const { lookup } = dns
        dns.lookup = (name, ...args) => {
          if (name !== 'monitor.invalid') return lookup(name, ...args)
          print('looks up')
          setInterval(() => {}, 1_000) // as the thread that looks it up keeps the process alive
        }
        options.cleanUp = cleanUp
        const beginBefore = begin
        begin = () => void beginBefore()`
      const env = { ...SHORT, FTW_MONITOR_LISTEN: 'monitor.invalid:8160' }
      const life = startLife(t, way, program, { env })
      await life.hasSaid('ready')
      await life.hasSaid('looks up')
      life.watched.child.kill('SIGTERM')
      const { said, signalCode, ms } = await life.awaitEnd()
      if (way === 'auto') assert.equal(signalCode, 'SIGTERM')
      else assert.ok(said.includes('cleaned up'))
      assert.ok(ms < 5_000, `it ends after ${ms} ms`)
    })
  }

  test('auto: a request from before a start() with options is served before cleanUp, and who keeps a connection lets that close the server', async (t) => {
    const program = `
      const cleanUpAll = async () => {
        isOpen = false
        await new Promise((resolve) => server.close(resolve))
        print('cleaned up')
      }
      process.on('SIGUSR2', async () => {
        const copy = await import(${JSON.stringify(`${MODULE.href}?copy=late`)})
        await copy.start({ server, healthPath: '/ready' })
        copy.shutdownOnSignal({ cleanUp: cleanUpAll })
        print('begun')
      })`
    const life = startLife(t, 'auto', program, { env: SHORT })
    const port = await life.isReady()
    const agent = new http.Agent({ keepAlive: true })
    t.after(() => agent.destroy())
    await getPage(port, '/', { agent })
    const answer = getPage(port, '/slow1200')
    await life.hasSaid('asked for /slow1200')
    life.watched.child.kill('SIGUSR2')
    await life.hasSaid('begun')
    life.watched.child.kill('SIGTERM')
    assert.equal((await answer).body, 'served')
    const { said, exitCode, ms } = await life.awaitEnd()
    assert.deepEqual([said.at(-1), exitCode], ['cleaned up', 0], life.watched.output)
    assert.ok(ms < 3_500, `it ends after ${ms} ms`)
  })

  test('no request meets a cleaned-up program, whenever a server begins to listen', async (t) => {
    const ports: number[] = []
    while (ports.length < 4) ports.push(await freePort())
    const program = `
      const ports = ${JSON.stringify(ports)}
      const late = ports.map(() => http.createServer((request, response) => handle(request, response)))
      const listenLater = (index, ms) => {
        late[index].on('listening', () => print('listens', index))
        setTimeout(() => late[index].listen({ host: '127.0.0.1', port: ports[index] }), ms)
      }
      options.minimumMs = 2_000
      options.onSignal = () => {
        listenLater(0, 400) // while probers are told
        listenLater(1, 2_500) // while the first server is closing
      }
      options.cleanUp = async () => {
        listenLater(2, 400)
        cleanUp()
        await pause(1_000)
      }
      process.on('SIGTERM', () => {
        listenLater(3, 400)
        setTimeout(() => process.exit(), 1_000)
      })
      begin = async () => {
        monitor.shutdownOnSignal(options)
        void monitor.start({ server: [server, ...late] })
      }`
    const life = startLife(t, 'in code', program)
    const slow = getPage(await life.isReady(), '/slow3500')
    await life.hasSaid('asked for /slow3500')
    const outcomes: string[] = []
    const askers = ports.map((port) => {
      return keepAsking(t, 10, async () => {
        outcomes.push(await getPage(port, '/slow200').then(({ body }) => body, codeOf))
      })
    })
    life.watched.child.kill('SIGTERM')
    const { said } = await life.awaitEnd()
    for (const asker of askers) await asker.stop()
    assert.equal((await slow).body, 'served')
    const listening = said.filter((line) => line !== 'cleaned up')
    assert.deepEqual(listening, ['listens 0', 'listens 1', 'listens 2', 'listens 3'])
    const accepted = life.watched.output.match(/^asked for \/slow200$/gm) ?? []
    const answers = outcomes.filter((outcome) => !/^E[A-Z]+$|hang up/.test(outcome))
    assert.ok(answers.length > 0)
    assert.deepEqual(answers, Array(accepted.length).fill('served'))
  })

  test('a server that begins to listen when all is over is closed, and keeps nothing alive', async (t) => {
    const path = join(scratchFolder(t), 'late.sock')
    const script = `
      const server = http.createServer(() => {})
      monitor.shutdownOnSignal()
      setTimeout(() => server.listen(${JSON.stringify(path)}), 300)
      server.on('listening', () => setImmediate(() => print('listens at', server.address())))
      process.kill(process.pid, 'SIGTERM')`
    const watched = runScript(t, { script })
    assert.equal(await watched.exit, 0)
    assert.match(watched.output, new RegExp(`listens at ${path}`))
    assert.doesNotMatch(watched.output, /keeps the process alive/)
    assert.equal(fs.existsSync(path), false)
  })

  for (const way of IS_SLOW_WANTED ? WITH_US : WITH_US.slice(0, 1)) {
    test(`${way}: an upgrade, a refused one and a CONNECT are requests in flight until they are answered`, async (t) => {
      const program = `${atItsEnd('cleanUp()')}
        const answer = async ({ method, url }, socket) => {
          print('asked for', url)
          socket.on('error', () => {})
          // One is longer than upgraded connections have for their goodbye.
          await pause(url === '/401' ? 1_500 : 400)
          socket.write('HTTP/1.1 ' + url.slice(1) + (isOpen ? ' open' : ' closed') + '\\r\\n\\r\\n')
          if (url === '/401') socket.end()
          print('answered')
        }
        server.on('upgrade', answer)
        server.on('connect', answer)`
      const life = startLife(t, way, program)
      const port = await life.isReady()
      const answers: Promise<string>[] = []
      for (const line of ['GET /101', 'GET /401', 'CONNECT /200']) {
        const [method = '', path = ''] = line.split(' ')
        const head = headOf(path, 'Connection: Upgrade', 'Upgrade: echo').replace('GET', method)
        answers.push(ask(port, head).catch(codeOf))
        await life.hasSaid(`asked for ${path}`)
      }
      life.watched.child.kill('SIGTERM')
      const { said, ms } = await life.awaitEnd()
      const firstLines = (await Promise.all(answers)).map((text) => text.split('\r\n')[0])
      assert.deepEqual(firstLines, ['HTTP/1.1 101 open', 'HTTP/1.1 401 open', 'HTTP/1.1 200 open'])
      assert.deepEqual(said, ['answered', 'answered', 'answered', 'cleaned up'])
      assert.ok(ms < 6_000, `it ends after ${ms} ms`)
    })

    for (const kind of ['TCP', 'Unix']) {
      test(`${way}: a ${kind} socket that was passed on keeps its backlog for whoever listens next`, async (t) => {
        const path = join(scratchFolder(t), 'bound')
        const place = kind === 'Unix' ? { path } : LOOPBACK
        const socket = await startListening(t, net.createServer(), place)
        if (kind === 'Unix') fs.linkSync(path, `${path}2`) // the first name goes with our server
        const where = kind === 'Unix' ? `${path}2` : portOf(socket)
        const { _handle: handle } = socket as unknown as { _handle: { fd: number } }
        const stdio: StdioOptions = ['pipe', 'pipe', 'pipe', handle.fd]

        const first = startLife(t, way, listensOnSocket(), { stdio })
        const whenTold = listensOnSocket("await once(process.stdin, 'data')")
        const next = startLife(t, 'alone', whenTold, { stdio })
        await first.isReady()
        socket.close() // before anybody connects, or this process would accept
        first.watched.child.kill('SIGTERM')
        await first.hasSaid('cleaned up')
        await assertBurstServed(t, where, () => void next.watched.child.stdin?.write('listen'))
        assert.equal((await first.awaitEnd()).exitCode, 0, first.watched.output)
      })
    }

    test(`${way}: a socket that was given to a child has its backlog back at the end`, async (t) => {
      const heir = `
        import http from 'node:http'
        import { setTimeout as pause } from 'node:timers/promises'
        let answers = 0
        const server = http.createServer((_, response) => {
          response.end('served')
          answers++
          if (answers === ${BURST}) server.close()
        })
        process.on('message', (_, socket) => server.listen(socket, () => process.send('listens')))
        process.on('disconnect', async () => {
          await pause(200) // for the parent's handle to close
          console.log('alone')
          Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0, 700) // and accepts nobody
          setTimeout(() => process.exit(), 15_000).unref()
        })`
      const program = `
        options.cleanUp = cleanUp
        const { fork } = await import('node:child_process')
        const beginBefore = begin
        begin = async () => {
          await beginBefore()
          const env = { ...process.env, FTW_MONITOR: '0' }
          const execArgv = ['--input-type=module', '-e', ${JSON.stringify(heir)}]
          const child = fork('heir', { env, execArgv })
          child.send('server', server)
          await once(child, 'message')
        }`
      const life = startLife(t, way, program)
      const port = await life.isReady()
      life.watched.child.kill('SIGTERM')
      await life.hasSaid('alone')
      await assertBurstServed(t, port)
    })
  }

  for (const policy of ['SCHED_NONE', 'SCHED_RR']) {
    test(`auto: in a cluster with ${policy} a worker that disconnects ends, and keeps nobody from the others`, async (t) => {
      const program = `
        const { default: cluster } = await import('node:cluster')
        if (cluster.isPrimary) {
          cluster.schedulingPolicy = cluster.${policy}
          cluster.setupPrimary({ exec: 'worker' }) // which runs the same script
          for (let count = 0; count < 2; count++) cluster.fork()
          cluster.on('exit', (worker, code) => print('worker ended with', code))
          listen = () => {}
        } else {
          begin = () => print('worker', process.pid, server.address().port)
          process.on('SIGTERM', async () => {
            cleanUp()
            await pause(1_500)
            cluster.worker.disconnect()
          })
        }`
      const { watched, hasSaid } = startLife(t, 'auto', program)
      const workers = () => [...watched.output.matchAll(/^worker (\d+) (\d+)$/gm)]
      await until(() => workers().length === 2, 'both workers serve')
      await until(() => watched.output.match(/listening on/g)?.length === 2, 'both have monitors')
      const [, pid, port] = workers()[0] ?? []
      process.kill(Number(pid), 'SIGTERM')
      await hasSaid('cleaned up')
      const blocked = getPage(Number(port), '/block700')
      await hasSaid('asked for /block700')
      await assertBurstServed(t, Number(port))
      await blocked
      await hasSaid('worker ended with 0')
    })
  }
})

// --- The program ---------------------------------------------------------------------------------

/** Has copies of the program run one after the other, each when nothing keeps the one before alive,
 *  and tells the exit status and what was printed of each. */
const RUN_CALLS = `
  import fs from 'node:fs'
  import { pathToFileURL } from 'node:url'

  const { CALLS, ...env } = process.env
  const { program, folder, calls } = JSON.parse(CALLS)
  let said
  for (const stream of ['stdout', 'stderr']) {
    process[stream].write = (text) => {
      said[stream] += text
      return true
    }
  }
  process.on('beforeExit', (status) => {
    if (said) fs.writeSync(1, JSON.stringify({ ...said, status }) + '\\n')
    process.exitCode = 0
    const call = calls.shift()
    if (!call) return
    said = { line: call.line, stdout: '', stderr: '' }
    const file = folder + '/' + calls.length + '.m' + program.slice(-2)
    fs.copyFileSync(program, file)
    process.argv = [process.execPath, file, ...call.words]
    process.env = { ...env, ...call.env }
    setImmediate(() => import(pathToFileURL(file)))
  })`

interface Outcome {
  line: string
  status: number
  stdout: string
  stderr: string
}

/** Runs command lines of the program, as a shell would: `PORT=8080 drain 'until noon'`. One process
 *  does for all, since most of the work of each is to start Node.js. */
async function runLines<const Lines extends readonly string[]>(
  t: TestContext,
  lines: Lines,
  options: ProcessOptions & { flags?: string[] } = {}
): Promise<{ [Index in keyof Lines]: Outcome }> {
  const calls = lines.map((line) => {
    const words = Array.from(line.matchAll(/'([^']*)'|(\S+)/g), ([, quoted, bare]) => {
      return quoted ?? bare ?? ''
    })
    const env: Record<string, string> = {}
    while (/^[A-Z_]+=/.test(words[0] ?? '')) {
      const [name = '', value = ''] = words.shift()!.split('=')
      env[name] = value
    }
    return { line, words, env }
  })
  const { flags = [], ...others } = options
  const setup = { program: PROGRAM, folder: scratchFolder(t), calls }
  const env = { HOST: '127.0.0.1', ...options.env, CALLS: JSON.stringify(setup) }
  const words = [...flags, '--no-warnings', '--input-type=module', '-e', RUN_CALLS]
  const all = runToEnd(t, process.execPath, words, { ...others, env })
  const { status, stdout, stderr } = await inTime(all, lines.join('; '), 60_000)
  assert.deepEqual([status, stderr], [0, ''])
  return JSON.parse(`[${stdout.trimEnd().replaceAll('\n', ',')}]`)
}

/** Fails unless each line is refused, or fails, with this sentence. */
async function assertFailures(
  t: TestContext,
  rows: Record<string, string>,
  options: Parameters<typeof runLines>[2] = {}
): Promise<void> {
  const expected = Object.entries(rows).map(([line, sentence]) => {
    return { line, status: 2, stdout: '', stderr: `ftw-monitor: ${sentence}\n` }
  })
  assert.deepEqual(await runLines(t, Object.keys(rows), options), expected)
}

/** What several instances reply to a request for their status, some with nonsense; `other` with the
 *  type of another service. */
const FLEET: Record<string, string | object> = {
  other: { error: 'not found' },
  well: {
    status: 'pass',
    checks: {
      uptime: [{ observedValue: 12.7 }],
      'requests:inFlight': [{ observedValue: 2 }],
      'eventLoop:utilization': [{ observedValue: 0.18 }],
      'memory:resident': [{ observedValue: 58 * 2 ** 20 }]
    }
  },
  none: { status: 'fail', output: 'red', checks: null },
  mute: { status: 'fail' },
  fake: { output: 'OK in spite of all' },
  warming: {
    status: 'fail',
    output: 'Warmup in progress',
    checks: {
      'warmup:duration': [{ componentId: EVIL, observedValue: 0, stage: 'running' }],
      uptime: [{ observedValue: EVIL }],
      'memory:resident': [{}]
    }
  },
  evil: JSON.stringify({
    status: 'fail',
    output: `OK ${EVIL}`,
    checks: { 'requests:inFlight': [null], 'memory:resident': 'INFINITE' }
  }).replace('"INFINITE"', '[{"observedValue":1e999}]')
}

describeProcesses('The program', SIDE_BY_SIDE, () => {
  test('the program prints the reply, and its exit status tells how it went', async (t) => {
    let isConnected = true
    const { failures, performers } = recordSites('/shop')
    const path = join(scratchFolder(t), 'monitor')
    const port = await freePort()
    const server = await serve(t, hello, { host: '127.0.0.1', port })
    const onPath = await importMonitor(t)
    await onPath.start({ server, logger: recorder(), listen: { path } })
    onPath.register('where', '', (connection) => connection.write('on a path\n'))
    const { monitor } = await bootInstance(t, {
      server,
      databases: { main: { isConnected: () => isConnected } },
      performers,
      options: { listen: { host: '127.0.0.1', port: port + 80 } }
    })
    const report = 'Errors: none\nError: 0\nall well\n'
    monitor.register('where', '', (connection) => connection.write('on a port\n'))
    monitor.register('echo', '', (connection, ...words) => connection.write(`${words.join('|')}\n`))
    monitor.register('reports', '', (connection) => connection.write(report))
    monitor.register('late', '', (connection) => {
      connection.write('half of it\n')
      throw new TypeError('boom')
    })
    monitor.register('break', '', (connection) => {
      isConnected = false
      failures['/shop'] = new Error('no such table')
      connection.write('broken\n')
    })
    const rows: [line: string, status: number, reply: string][] = [
      ['health_check', 0, 'OK\n'],
      ['', 0, await ask(port + 80, 'help\n')],
      ['help quit', 0, await ask(port + 80, 'help quit\n')],
      ['help drian', 2, 'Invalid command \'drian\'\nTry "help".\n'],
      ['nope', 2, 'Invalid command \'nope\'\nTry "help".\n'],
      ["echo a 'b c'", 0, 'a|b|c\n'],
      ['reports', 0, report],
      ['late', 1, 'half of it\nTypeError: boom\n'],
      [`late ${'x'.repeat(5_000)}`, 1, 'Line too long\n'],
      ['dbinfo nope', 1, "Error: no database 'nope' is registered\n"],
      ['zeostatus', 0, 'True\n'],
      ['warmup /shop', 0, 'Warmup successful\n'],
      [`FTW_MONITOR_LISTEN=203.0.113.1:${port + 80} --host 127.0.0.1 where`, 0, 'on a port\n'],
      [`PORT=9 FTW_MONITOR_LISTEN=${port + 80} where`, 0, 'on a port\n'],
      [`FTW_MONITOR_LISTEN=${path} where`, 0, 'on a path\n'],
      ['break', 0, 'broken\n'],
      ['health_check', 1, "Error: Database 'main' disconnected.\n"],
      ['zeostatus', 1, 'False\n'],
      ['perf_metrics', 1, `{"error":"Database 'main' disconnected."}\n`],
      ['warmup /shop', 1, 'Warmup failed: /shop: no such table\n']
    ]
    const lines = rows.map(([line]) => line)
    const results = await runLines(t, lines, { env: { PORT: String(port) } })
    const expected = rows.map(([line, status, stdout]) => ({ line, status, stdout, stderr: '' }))
    assert.deepEqual(results, expected)
  })

  test('the program prints a reply as it comes, joins the terminal to interactive, and by `status --watch` tells the status once a second, also while the instance is away, until Ctrl-C, or until nobody reads, and ends with its verdict', async (t) => {
    const gate = latch()
    const { monitor, port } = await bootInstance(t)
    monitor.register('bitwise', '', async (connection) => {
      connection.write('a bit\n')
      await gate.opened
      connection.write('another bit\n')
    })
    const env = { FTW_MONITOR_LISTEN: `127.0.0.1:${port}` }
    const asked = startProgram(t, ['bitwise'], env)
    await until(() => asked.output === 'a bit\n', 'the first bit is printed')
    gate.open()
    assert.equal(await asked.exit, 0)
    assert.equal(asked.output, 'a bit\nanother bit\n')

    const joined = startProgram(t, ['interactive'], env)
    await until(() => joined.output === INTERACTIVE, 'interactive mode is on')
    joined.child.stdin?.write('health_check\n')
    await until(() => joined.output === `${INTERACTIVE}OK\n`, 'the first line is answered')
    joined.child.stdin?.write('warmup_state\nquit\n') // the terminal itself stays open
    assert.equal(await joined.exit, 0)
    assert.equal(joined.output, `${INTERACTIVE}OK\n1 0\nGoodbye.\n`)

    const read = startProgram(t, ['status', '--watch'], env)
    const unread = startProgram(t, ['status', '--watch'], env)
    const isGreenTwice = () => read.stdout.split(/^OK$/m).length > 2 && /^OK$/m.test(unread.stdout)
    await until(isGreenTwice, 'it is green')
    unread.child.stdout?.destroy()
    assert.equal(await inTime(unread.exit, 'it ends'), 0)
    await monitor.stop()
    const refused = `cannot ask 127.0.0.1:${port}: connect ECONNREFUSED`
    await until(() => read.stdout.includes(refused), 'nobody answers')
    read.child.kill('SIGINT')
    assert.equal(await inTime(read.exit, 'it ends'), 1)
  })

  test('a link to the file and a copy of it run the program, importing the module or bundling it never does', async (t) => {
    const folder = scratchFolder(t)
    const { port } = await bootInstance(t)
    const write = (name: string, text: string | Buffer) =>
      fs.writeFileSync(join(folder, name), text)
    for (const name of ['ftw-monitor', 'bundled']) fs.mkdirSync(join(folder, name))
    write('package.json', '{ "type": "module" }')
    const printed: Record<string, string> = {}

    for (const name of ['ftw-monitor/ftw-monitor', '100% 한 #?.js']) {
      fs.symlinkSync(PROGRAM, join(folder, name))
      printed[name] = 'OK\n'
    }
    for (const name of ['monitor.js', 'monitor.mjs', 'ftw-monitor.mjs']) {
      write(name, `import ${JSON.stringify(MODULE.href)}\nconsole.log('imported')\n`)
      printed[name] = 'imported\n'
    }
    const exporting = /^#!.*|^export (?=async|class|const|function|interface|type)/gm
    const bundle = fs.readFileSync(PROGRAM, 'utf8').replace(exporting, '')
    for (const name of [`monitor${EXTENSION}`, `ftw-monitor.m${EXTENSION.slice(1)}`]) {
      write(`bundled/${name}`, `${bundle}\nconsole.log('bundled')\n`)
      printed[`bundled/${name}`] = 'bundled\n'
    }
    if (EXTENSION === '.js') {
      write('ask.mjs', fs.readFileSync(PROGRAM))
      write('ftw-monitor.cjs', fs.readFileSync(new URL('monitor.cjs', MODULE)))
      write('monitor.cjs', "require('./ftw-monitor.cjs')\nconsole.log('required')\n")
      printed['ask.mjs'] = 'OK\n'
      printed['ftw-monitor.cjs'] = 'OK\n'
      printed['monitor.cjs'] = 'required\n'
    }
    const env = { FTW_MONITOR_LISTEN: `127.0.0.1:${port}`, NODE_OPTIONS: '' }
    const run = (name: string) => {
      const words = programWords(['health_check'], join(folder, name))
      return runToEnd(t, process.execPath, words, { env })
    }
    for (const [name, stdout] of Object.entries(printed)) {
      assert.deepEqual(await run(name), { status: 0, stdout, stderr: '' }, name)
    }
    if (EXTENSION !== '.js') return
    env.NODE_OPTIONS = `--require=${join(folder, 'ftw-monitor.cjs')}`
    assert.deepEqual(await run('monitor.cjs'), { status: 0, stdout: 'required\n', stderr: '' })
  })

  test('the dump is strict line protocol, in the order of the names, without what is dead', async (t) => {
    const one = await fakeInstance(t, (socket) => socket.end('{"cache":{"size":1}}\n'))
    const odd =
      '{"a b,=\\\\":{"c\\nd\\u001b":1},"s":{"q":"x\\"y\\\\z\\n,= é"},"n":{"big":1e300,' +
      '"small":-1e-7,"huge":1e999,"yes":true,"none":null,"list":[1]}}\n'
    const other = await fakeInstance(t, (socket) => socket.end(odd))
    const dead = await freePort()
    const cwd = join(scratchFolder(t), 'my deployment,a=b')
    fs.mkdirSync(cwd)
    const named = `'web 2=127.0.0.1:${one}' web,1=${one} ${dead} ${one} 'a b\\=localhost:${one}'`
    const lines = [
      `dump-perf-metrics ${named} 127.0.0.1:${one}`,
      `dump-perf-metrics --deployment 'prod = 1, north\\' b=${other}`
    ] as const
    const [first, second] = await runLines(t, lines, { cwd })
    const point = `deployments,deployment=my\\ deployment\\,a\\=b,process`
    assert.deepEqual(first.stdout.split('\n'), [
      `${point}=127.0.0.1:${one} cache.size=1`,
      `${point}=${one} cache.size=1`,
      `${point}=a\\ b cache.size=1`,
      `${point}=web\\ 2 cache.size=1`,
      `${point}=web\\,1 cache.size=1`,
      ''
    ])
    const fields = 'a\\ b\\,\\=\\.c\\ d\\ =1,n.big=1e+300,n.small=-1e-7,s.q="x\\"y\\\\z ,= é"'
    const tags = 'deployment=prod\\ \\=\\ 1\\,\\ north,process=b'
    assert.equal(second.stdout, `deployments,${tags} ${fields}\n`)
    const warning = `ftw-monitor: ${dead}: connect ECONNREFUSED 127.0.0.1:${dead + 80}\n`
    assert.deepEqual([first.status, first.stderr], [0, warning])
    assert.deepEqual([second.status, second.stderr], [0, ''])
  })

  test('instances that hang, drip or reply nonsense are asked at the same time, have one second, and cost a warning each', async (t) => {
    const replies = [
      '',
      'OK\n',
      '{"cache":{"size":1}',
      'null\n',
      '{"cache":{"size":null}}\n',
      '{"error":"Database \'main\' disconnected."}\n',
      "Error: no database 'main' is registered\n",
      'HTTP/1.1 400 Bad Request\r\n\r\n',
      '{"error":"red \\u001b[31m\\nforged: warning"}\n'
    ]
    const events: string[] = []
    const drip = (socket: net.Socket) => {
      events.push('asked')
      const timer = setInterval(() => socket.write(' '), 100)
      socket.on('close', () => {
        events.push('given up')
        clearInterval(timer)
      })
    }
    const broken: number[] = []
    for (const reply of replies) broken.push(await fakeInstance(t, (socket) => socket.end(reply)))
    const silent = [await fakeInstance(t, drip), await fakeInstance(t, drip)]
    silent.push(await fakeInstance(t, () => {}))

    const began = Date.now()
    const [outcome] = await runLines(t, [`dump-perf-metrics ${[...silent, ...broken].join(' ')}`])
    const took = Date.now() - began
    assert.ok(took >= 1_000 && took < 10_000, `${took} ms`)
    assert.deepEqual(events.slice(0, 2), ['asked', 'asked'])
    assert.deepEqual([outcome.status, outcome.stdout], [1, ''])
    const warnings = outcome.stderr.split('\n').slice(0, -1)
    const places = warnings.map((warning) => Number(/^ftw-monitor: (\d+): ./.exec(warning)?.[1]))
    assert.deepEqual(places.sort(), [...silent, ...broken].sort())
    assert.equal(outcome.stderr.match(/no answer within 1 s\n/g)?.length, 3, outcome.stderr)
    for (const warning of warnings) assert.doesNotMatch(warning, UNSAFE)
  })

  test('control characters in a reply do not reach the terminal', async (t) => {
    const port = await fakeInstance(t, (socket) => {
      socket.setNoDelay().write(`${EVIL}\nhealthy\tlong \x1b`)
      socket.once('data', () => socket.end(']0;title\x07\u009b5m\x7f\n'))
    })
    const lines = ['help', 'interactive', 'health_check']
    for (const result of await runLines(t, lines, { env: { PORT: String(port) } })) {
      assert.match(result.stdout, /healthy\tlong/)
      assert.doesNotMatch((result.stdout + result.stderr).replace(/[\n\t]/g, ''), UNSAFE)
    }
  })

  test('--help, -h and --version print and exit with 0, wherever they stand, whatever the environment says', async (t) => {
    const { version } = JSON.parse(fs.readFileSync(new URL('package.json', ROOT), 'utf8'))
    const odd = 'PORT=/tmp/instance.sock FTW_MONITOR_LISTEN=nonsense --help'
    const lines = ['--version', '--help', odd, 'drain --help', 'wait here -h'] as const
    const [{ stdout: printed }, ...others] = await runLines(t, lines)
    assert.equal(printed, `${version}\n`)
    const usage = /^ftw-monitor COMMAND \[INSTANCE\] \[ARGS…\]\n[^]*--port N[^]*; 2 where/
    for (const { line, status, stdout, stderr } of others) {
      assert.deepEqual([status, stderr], [0, ''], line)
      assert.match(stdout, usage, line)
    }
  })

  test('a call that may mean another instance is refused, and sends nothing; else a command takes the instance that it is told, wherever PORT is, at its host, else at --host, else at HOST', async (t) => {
    let connections = 0
    const told: string[] = []
    const one = await freePort()
    const server = net.createServer((socket) => {
      connections++
      socket.on('error', () => {})
      socket.once('data', (line) => {
        const host = socket.localAddress === '127.0.0.1' ? '' : `${socket.localAddress} `
        told.push(host + String(line))
        socket.end('all well\n')
      })
    })
    await startListening(t, server, { host: '0.0.0.0', port: one + 80 })
    const other = await fakeInstance(t, (socket) => {
      connections++
      socket.end('OK\n')
    })
    const env = { PORT: String(other) }

    const named = 'one is named [NAME=][HOST:]PORT'
    const comesFirst = 'may be an instance: that comes first, and a reason that looks so after --'
    const orReason = `may be an instance or a reason: ${named}, and a reason that looks so comes`
    const which = `${one} may be a port or a reason: say drain --port ${one}, or drain --`
    const refused: Record<string, string> = {
      [`drain --prot ${one}`]: 'drain knows no --prot; a reason with dashes comes after --',
      [`drain ${one}`]: `${which} ${one}`,
      [`drain '${one} until noon'`]: `${which} ${one} until noon`,
      [`drain until noon app1=${one}`]: `app1=${one} ${comesFirst}`,
      [`drain ::1:${one}`]: `::1:${one} is no instance; ${named}`,
      [`drain 127.0.0.1:${one}x 'until noon'`]: `127.0.0.1:${one}x ${orReason} after --`,
      "status ' '": 'status has an empty argument: is a variable not set?',
      "''": 'the command is empty; try ftw-monitor --help',
      "echo 'two\nlines'": 'a command is one line',
      [`--prot ${one} drain`]: 'knows no --prot before the command; try ftw-monitor --help',
      [`health_check -p ${one}`]: 'health_check knows no -p; try ftw-monitor --help',
      'wait --deployment shop': 'wait knows no --deployment; try ftw-monitor --help',
      'demo 0': "cannot use '0': demo takes options alone; try ftw-monitor --help",
      [`resume --host --port ${one}`]: '--host needs a value',
      [`resume --port ${one} --port=${one}`]: '--port is given twice',
      'status --watch=1': '--watch takes no value',
      'status --json --watch': 'status takes --json or --watch, not both',
      'resume app1=65500': '65500 is no instance port',
      'resume 99999': `99999 is no instance; ${named}`,
      'resume --port /run/web': '/run/web is no port; a socket is named by FTW_MONITOR_LISTEN',
      [`status ${one} app2`]: "cannot use 'app2': status takes [INSTANCE…]; try ftw-monitor --help",
      [`resume ${one} a=${other}`]: `resume takes one instance, not ${one} and a`,
      [`status --port ${one} ${other}`]: `--port ${one} and ${other} are two instances: name one`,
      "warmup '/shop app1=5'":
        "cannot use 'app1=5': warmup takes [INSTANCE] [SITE]; try ftw-monitor --help",
      'wait --timeout -1': '--timeout needs a number of seconds',
      'wait --pid 0': "--pid needs the number of a process, not '0'",
      'wait --pid 4294967296': "--pid needs the number of a process, not '4294967296'",
      'dump-perf-metrics': 'dump-perf-metrics needs instances, [NAME=][HOST:]PORT',
      'PORT=31o01 health_check': 'PORT=31o01 is no instance port'
    }
    await assertFailures(t, refused, { env })
    assert.equal(connections, 0)

    const ownWords = "--all -x 'a=1' 8080 12:30 --help -- --port 5"
    const taken: Record<string, string> = {
      [`health_check app1=${one}`]: 'health_check\n',
      [`health_check 'app 1=localhost:${one}'`]: 'health_check\n',
      [`health_check ${one}`]: 'health_check\n',
      [`health_check --port=${one}`]: 'health_check\n',
      [`'drain app1=${one} until noon'`]: 'drain until noon\n',
      [`drain 127.0.0.1:${one} 'from 12:30 -' 13:30`]: 'drain from 12:30 - 13:30\n',
      [`drain app1=${one} -- --odd a=1 5`]: 'drain --odd a=1 5\n',
      [`drain app1=${one} -- ticket:42x`]: 'drain ticket:42x\n',
      [`drain --port ${one} -- ${other}`]: `drain ${other}\n`,
      [`PORT=${one} drain -- ${other}`]: `drain ${other}\n`,
      [`warmup ${one} /shop?a=1`]: 'warmup /shop?a=1\n',
      [`dbinfo - 60 app1=${one}`]: 'dbinfo - 60\n',
      [`help drain app1=${one}`]: 'help drain\n',
      [`dump-perf-metrics --port ${one}`]: 'perf_metrics\n',
      [`status --port ${one} --host [127.0.0.1]`]: 'status\n',
      // A service's own command gets all of its arguments, but --port and --host.
      [`queue --port ${one} --host=127.0.0.1 ${ownWords}`]:
        'queue --all -x a=1 8080 12:30 --help -- --port 5\n',
      [`'queue --port 5' --port ${one}`]: 'queue --port 5\n',
      [`health_check 127.0.0.2:${one} --host 127.0.0.3`]: '127.0.0.2 health_check\n',
      [`health_check --host 127.0.0.2 a=${one}`]: '127.0.0.2 health_check\n',
      [`HOST=127.0.0.3 health_check a=${one}`]: '127.0.0.3 health_check\n',
      [`HOST=127.0.0.3 dump-perf-metrics a=${one}`]: '127.0.0.3 perf_metrics\n'
    }
    await runLines(t, Object.keys(taken), { env })
    assert.deepEqual(told, Object.values(taken))
    assert.equal(connections, told.length) // none at the other
  })

  test('`ftw-monitor wait --pid` waits while there is such a process, be it of somebody else, and ends with 1 as soon as it is gone, or a zombie', async (t) => {
    const { port } = await bootInstance(t, { performers: WARM })
    const env = { FTW_MONITOR_LISTEN: `127.0.0.1:${port}` }
    const lines = ['wait --pid 999999999', `wait --pid ${process.pid}`] as const
    const [gone, alive] = await runLines(t, lines, { env })
    assert.deepEqual([gone.status, gone.stdout], [1, 'process 999999999 is gone\n'])
    assert.match(alive.stdout, /^\d+\.\d s {2}OK\n$/)
    const denied = "process.kill = () => { throw Object.assign(new Error(), { code: 'EPERM' }) }"
    const flags = [`--import=data:text/javascript,${encodeURIComponent(denied)}`]
    const [foreign] = await runLines(t, ['wait --pid 999999999'], { env, flags })
    assert.deepEqual([alive.status, foreign.status], [0, 0], foreign.stdout)

    if (!fs.existsSync('/proc/self/exe')) return
    const hung = await fakeInstance(t, (socket) => socket.end())
    // The parent never asks how its child ended.
    const parent = watch(t, 'sh', ['-c', 'sleep 60 & echo $!; exec sleep 60'])
    await until(() => parent.stdout.endsWith('\n'), 'a child begins')
    const pid = parent.stdout.trim()
    const waiting = startProgram(t, ['wait', String(hung), '--pid', pid], { HOST: '127.0.0.1' })
    await until(() => /s {2}no answer\n$/.test(waiting.stdout), 'it waits')
    process.kill(Number(pid), 'SIGKILL')
    assert.equal(await inTime(waiting.exit, 'it gives up'), 1)
    assert.match(waiting.output, new RegExp(`^\\d+\\.\\d s  no answer\nprocess ${pid} is gone\n$`))
  })

  test('`wait` under FTW_MONITOR=0 waits until the instance accepts connections', async (t) => {
    const port = await freePort()
    const off = { FTW_MONITOR: '0', HOST: '127.0.0.1' }
    const waiting = startProgram(t, ['wait', '--port', String(port)], off)
    const first = 'FTW_MONITOR is off: waits for the port of the instance alone\n'
    await until(() => waiting.output.includes('ECONNREFUSED'), 'nobody listens')
    assert.ok(waiting.output.startsWith(first), waiting.output)
    await serve(t, hello, { host: '127.0.0.1', port })
    assert.equal(await inTime(waiting.exit, 'it accepts connections'), 0)
    assert.match(waiting.output, /\n\d+\.\d s {2}OK\n$/)

    // Nothing is known of the port of the instance.
    const [unknown] = await runLines(t, ['FTW_MONITOR_LISTEN=127.0.0.1:9 wait'], { env: off })
    assert.deepEqual([unknown.status, unknown.stderr], [0, ''])
  })

  test('the program tells the status and the figures of an instance, and knows the arguments of each command that its help lists', async (t) => {
    const { port } = await bootInstance(t, { performers: WARM })
    const env = { FTW_MONITOR_LISTEN: `127.0.0.1:${port}` }
    const lines = ['status', `dump-perf-metrics a=${port - 80}`, 'drain now', 'status'] as const
    const [green, dumped, drained, red] = await runLines(t, lines, { env })
    assert.match(green.stdout, /^OK\ninstance   http:[^]*\ndraining   no\nsince .*Z  healthy\n/)
    const figures = /,process=a cache\.max_size=-1,.*,instance\.pid=\d+,.*,memory\.uss=-1\n$/
    assert.match(dumped.stdout, figures)
    assert.match(drained.stdout, /\nDrained\n$/)
    assert.match(red.stdout, /^now\n/)
    assert.deepEqual([green.status, drained.status, red.status], [0, 0, 1])

    const list = await ask(port, 'help\n')
    const names = Array.from(list.matchAll(/^ {2}(\w+) -- /gm), ([, name = '']) => name)
    assert.ok(names.length > 10, list)
    const wrong = names.filter((name) => name !== 'drain').map((name) => `${name} /a /b /c`)
    for (const { line, status, stderr } of await runLines(t, wrong)) {
      const [name = ''] = line.split(' ')
      const refusal = `^ftw-monitor: cannot use '/[abc]': ${name} takes \\[INSTANCE…?\\][ A-Z[\\]]*; try`
      assert.match(stderr, new RegExp(refusal))
      assert.equal(status, 2)
    }
  })

  test('`ftw-monitor status` of several instances prints a line for each, or JSON, and nothing raw of what a monitor says', async (t) => {
    const ports: Record<string, number> = { nobody: await freePort() }
    let asked = 0
    for (const [name, reply] of Object.entries(FLEET)) {
      const type = name === 'other' ? 'application/json' : 'application/health+json'
      const head = `HTTP/1.1 200 -\r\nContent-Type: ${type}\r\n\r\n`
      const body = typeof reply === 'string' ? reply : JSON.stringify(reply)
      ports[name] = await fakeInstance(t, (socket) => {
        if (name === 'warming') asked++
        socket.once('data', () => socket.end(`${head}${body}\n`))
      })
    }
    const named = Object.entries(ports).map(([name, port]) => `${name}=${port}`)
    const cleaned = 'a [31mred  2J right to left line nul return'
    const reasons: Record<string, string> = {
      nobody: `connect ECONNREFUSED 127.0.0.1:${Number(ports['nobody']) + 80}`,
      other: 'what answers there gives no status',
      well: 'OK',
      none: 'red',
      mute: 'no reason given',
      fake: 'O K in spite of all',
      warming: 'Warmup in progress',
      evil: `O K ${cleaned}`
    }
    const waits = ['warming', 'evil', 'fake', 'other']
    const results = await runLines(t, [
      `status ${named.join(' ')}`,
      `status ${named.join(' ')} --json`,
      `status --json --port ${ports['nobody']}`,
      `status a=${ports['well']} ${ports['well']}`,
      `status --json --port ${ports['well']}`,
      ...waits.map((name) => `wait --timeout 1 ${name}=${ports[name]}`)
    ])
    const statuses = results.map(({ status }) => status)
    assert.deepEqual(statuses, [1, 1, 2, 0, 0, 1, 1, 1, 1])
    assert.ok(asked < 10, `asked ${asked} times, by wait every 250 ms`)
    for (const { stdout, stderr } of results) {
      assert.doesNotMatch(stdout.replaceAll('\n', ''), UNSAFE)
      assert.equal(stderr, '')
    }
    const [text, json, absent, , , ...waited] = results
    for (const [index, { stdout }] of waited.entries()) {
      const name = waits[index] ?? ''
      const why = reasons[name] + (name === 'warming' ? `: ${cleaned}, 1 of 1` : '')
      assert.equal(stdout.replace(/^\d+\.\d s  /, ''), `${why}\ntimed out after 1 s: ${why}\n`)
    }

    const figures = 'up 12 s, 2 in flight, loop 18 %, 58 MiB'
    const told = Object.entries(reasons).map(([name, why]) => {
      const shown = name === 'well' ? figures : ' '.repeat(figures.length)
      return `${name.padEnd(7)}  ${shown}  ${why}\n`
    })
    assert.equal(text.stdout, told.join(''))
    const rows = (JSON.parse(json.stdout) as object[]).map((each) => Object.values(each))
    const expected = Object.entries(reasons).map(([name, why]) => {
      const known = name === 'well' ? [12.7, 2, 0.18, 58 * 2 ** 20] : [-1, -1, -1, -1]
      const isReachable = name !== 'nobody' && name !== 'other'
      return [name, isReachable, name === 'well', why, ...known]
    })
    assert.deepEqual(rows, expected)
    const [fields = {}] = JSON.parse(absent.stdout) as object[]
    const { stdout: usage } = (await runLines(t, ['--help']))[0]
    const described = /\[\{ ([^}]*) \}\]/.exec(usage)?.[1]?.split(/,\s+/)
    assert.deepEqual(Object.keys(fields), described)
  })

  test('`ftw-monitor wait` prints each change of the reason and ends with OK, and never counts as a prober', async (t) => {
    let isConnected = false
    const gate = latch()
    const port = await freePort()
    const waiting = startProgram(t, ['wait', '--port', String(port)], { HOST: '127.0.0.1' })
    const untilSaid = (text: RegExp) => until(() => text.test(waiting.output), String(text))
    await untilSaid(/^\d+\.\d s .*ECONNREFUSED.*\n$/)
    await bootInstance(t, {
      databases: { main: { isConnected: () => isConnected } },
      performers: { '/': () => {}, '/shop': () => gate.opened, '/search': () => {} },
      options: { listen: { host: '127.0.0.1', port: port + 80 } },
      until: 'started'
    })
    await untilSaid(/s +Error: Database 'main' disconnected\.\n$/)
    isConnected = true
    await untilSaid(/s {2}Warmup in progress: \/shop, 2 of 3\n$/)
    gate.open()
    assert.equal(await waiting.exit, 0)
    const lines = waiting.output.trimEnd().split('\n')
    assert.equal(lines.length, 4, waiting.output)
    assert.match(lines[3] ?? '', /^\d+\.\d s +OK$/)
    const seconds = lines.map((line) => parseFloat(line))
    const inOrder = seconds.toSorted((one, other) => one - other)
    assert.deepEqual(seconds, inOrder)
    assert.equal(await askWhomItWaitsFor(port + 80), 0)
  })

  test('in a terminal `status --watch` writes over long rows, too', needs('script'), async (t) => {
    const reply = `OK\n${'long '.repeat(20)}\nshort\n`
    const port = await fakeInstance(t, (socket) => socket.end(reply))
    const words = [process.execPath, ...programWords(['status', '--watch', '--port', String(port)])]
    const env = { HOST: '127.0.0.1' }
    const watched = watch(t, 'script', ['-qec', words.join(' '), '/dev/null'], { env })
    await until(() => watched.stdout.split('\x1b[4A\x1b[JOK').length > 2, 'it is renewed')
  })

  test('the first line of drain names the instance, changes are printed once a second, and Not drained is status 1', async (t) => {
    const port = await fakeInstance(t, (socket) => {
      for (let count = 1; count <= 29; count++) {
        socket.write(`Draining: 0 of 1 probers know, ${count} requests in flight\n`)
      }
      const knows = 'Draining: 1 of 2 probers know\nDraining: 2 of 2 probers know\n'
      setTimeout(() => socket.end(`${knows}Not drained: resumed\nwith no line feed`), 2_500)
    })
    const [{ status, stdout }] = await runLines(t, [`drain app$&1=${port}`])
    assert.deepEqual(stdout.split('\n'), [
      'Draining app$&1: 0 of 1 probers know, 1 requests in flight',
      'Draining: 0 of 1 probers know, 29 requests in flight',
      'Draining: 1 of 2 probers know',
      'Not drained: resumed',
      'with no line feed'
    ])
    assert.equal(status, 1)

    const idle = await fakeInstance(t, (socket) => socket.end('Draining: 0 probers\nDrained\n'))
    const rows: Record<string, string> = {
      [`drain 127.0.0.1:${idle}`]: `127.0.0.1:${idle}`,
      [`drain --port ${idle}`]: `127.0.0.1:${idle}`,
      [`PORT=${idle} drain 'a bit' more Drained`]: `127.0.0.1:${idle}`,
      [`FTW_MONITOR_LISTEN=127.0.0.1:${idle + 80} drain`]: `127.0.0.1:${idle + 80}`
    }
    for (const { line, ...outcome } of await runLines(t, Object.keys(rows))) {
      const expected = `Draining ${rows[line]}: 0 probers\nDrained\n`
      assert.deepEqual(outcome, { status: 0, stdout: expected, stderr: '' }, line)
    }
  })

  test('a drain that nobody waits for any more is not carried out by an instance that hung', async (t) => {
    const { watched, port } = await bootService(t)
    await untilHealthy(port)
    watched.child.kill('SIGSTOP')
    const env = { FTW_MONITOR_LISTEN: `127.0.0.1:${port}` }
    const sequel = 'drain may still be carried out: ask status, then resume'
    const late = { drain: `cannot ask 127.0.0.1:${port}: no answer within 30 s; ${sequel}` }
    await assertFailures(t, late, { env, flags: [flagForTimeouts(30_000)] })

    const tellWhenSent = `--import=data:text/javascript,${encodeURIComponent(`
      import * as fs from 'node:fs'
      import * as net from 'node:net'
      const { write } = net.Socket.prototype
      net.Socket.prototype.write = function (text, ...others) {
        if (text !== 'drain\\n') return write.call(this, text, ...others)
        return write.call(this, text, (error) => error ?? fs.writeSync(2, 'sent\\n'))
      }`)}`
    for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
      const interrupted = startProgram(t, ['drain'], { ...env, NODE_OPTIONS: tellWhenSent })
      await until(() => interrupted.stderr === 'sent\n', 'the line is sent')
      interrupted.child.kill(signal)
      await interrupted.exit
      assert.equal(interrupted.child.signalCode, signal)
      assert.equal(interrupted.output, `sent\nftw-monitor: no answer before ${signal}; ${sequel}\n`)
    }
    watched.child.kill('SIGCONT')
    for (let count = 0; count < 5; count++) {
      assert.match(await ask(port, 'status\n'), /^OK\n[^]*\ndraining +no\n/)
    }
    assert.match(await ask(port, 'drain', { end: true }), /\nDrained\n$/)

    const begun = await fakeInstance(t, (socket) => socket.write('Draining: 0 probers\n'))
    const stopped = startProgram(t, ['drain', '--port', String(begun)], { HOST: '127.0.0.1' })
    await until(() => stopped.stdout !== '', 'it has begun')
    stopped.child.kill('SIGINT')
    await stopped.exit
    assert.equal(stopped.stderr, '', 'it has its answer')
  })

  test('an instance that hangs is given two seconds for a check, and 30 for what may be carried out; no reply is no success', async (t) => {
    const port = await fakeInstance(t, () => {})
    const late = (rest: string) => `cannot ask 127.0.0.1:${port + 80}: no answer within ${rest}`
    const rows: Record<string, string> = {
      resume: late('30 s; resume may still be carried out: ask status'),
      warmup: late('30 s; warmup may still be carried out: ask status'),
      queue: late('30 s; queue may still be carried out'),
      metrics: late('30 s')
    }
    const checks = ['health_check', 'readyz', 'agent_check', 'livez', 'warmup_state', 'monitor']
    for (const name of checks) rows[name] = late('2 s')
    const flags = [flagForTimeouts(2_000, 30_000)]
    await assertFailures(t, rows, { env: { PORT: String(port) }, flags })

    const tunnel = await fakeInstance(t, (socket) => socket.end())
    const lines = ['health_check', 'livez', 'resume', 'queue'].map((name) => {
      return [`${name} --port ${tunnel}`, `cannot ask 127.0.0.1:${tunnel + 80}: no answer`]
    })
    await assertFailures(t, Object.fromEntries(lines) as Record<string, string>)

    const nobody = await freePort()
    const place = `127.0.0.1:${nobody + 80}`
    const refused = `cannot ask ${place}: connect ECONNREFUSED ${place}`
    const rule = 'an instance is named by its own port; its monitor is 80 higher'
    await assertFailures(t, {
      [`PORT=${nobody} health_check`]: `${refused} (name the instance: --port N)`,
      [`health_check --port ${nobody}`]: `${refused} (${rule})`,
      [`FTW_MONITOR_LISTEN=${place} health_check`]: refused
    })
  })
})

// --- Real programs -------------------------------------------------------------------------------

const POSTGRES_FOLDER = findPostgres()
const NEEDS_POSTGRES = POSTGRES_FOLDER ? {} : { skip: 'PostgreSQL is not installed' }
const NEEDS_DATABASES = { ...NEEDS_POSTGRES, ...NEEDS_PACKAGES, ...needs('redis-server') }
const NEEDS_PROMETHEUS = { ...needs('prometheus'), ...NEEDS_PACKAGES }

/** The folder of PostgreSQL's programs, which Debian has by version, outside of the path. */
function findPostgres(): string | undefined {
  const debian = '/usr/lib/postgresql'
  const versions = fs.existsSync(debian) ? fs.readdirSync(debian).reverse() : []
  const folders = [...versions.map((version) => join(debian, version, 'bin')), ...PATH_FOLDERS]
  return folders.find((folder) => fs.existsSync(join(folder, 'initdb')))
}

interface Instance {
  port: number
  instancePort: number
}

/** Runs HAProxy, and gives what asks it for the state of its servers. */
async function startHaproxy(t: TestContext, configuration: string) {
  const folder = scratchFolder(t)
  const file = join(folder, 'haproxy.cfg')
  const socket = join(folder, 'socket')
  fs.writeFileSync(file, `global\n  stats socket ${socket} level admin\n${configuration}`)
  const haproxy = watch(t, 'haproxy', ['-db', '-f', file])

  const command = (text: string) => ask(socket, `${text}\n`)
  const isRunning = async () => {
    assert.equal(haproxy.child.exitCode, null, haproxy.output)
    return fs.existsSync(socket) && (await command('show info').catch(() => '')) !== ''
  }
  await until(isRunning, 'HAProxy runs')
  assert.doesNotMatch(haproxy.output, /\[(ALERT|WARNING)\].* config : /)

  /** What HAProxy holds of a server, in the column `status` of its table or in another one. */
  const stateOf = async (name: string, column = 'status'): Promise<string> => {
    const table = (await command('show stat')).replace(/^# /, '')
    const [head = [], ...rows] = table.split('\n').map((row) => row.split(','))
    const row = rows.find((each) => each[head.indexOf('svname')] === name) ?? []
    return row[head.indexOf(column)] ?? ''
  }
  const untilState = async (name: string, state: RegExp, column?: string) => {
    const isThere = async () => state.test(await stateOf(name, column))
    await until(isThere, `HAProxy has ${name} ${state}`)
  }
  return { command, stateOf, untilState }
}

/** The README's configuration of HAProxy, and that with its lines for a tcp-check. */
function haproxyOfReadme(): { byAgent: string; byTcpCheck: string } {
  const byAgent = readmeBlock('haproxy')
  const lines = readmeBlock('haproxy', 'tcp-check')
  const byTcpCheck = byAgent.replace(/^ *option httpchk .*\n *default-server .*\n/m, lines)
  assert.match(byAgent, /^ *default-server check .*agent-send "agent_check\\n"/m)
  assert.match(byTcpCheck, /^ *tcp-check expect string OK\n *default-server check inter /m)
  return { byAgent, byTcpCheck }
}

/** HAProxy as in the README before these instances, with checks ten times a second; nothing is tried
 *  twice. */
async function balance(
  t: TestContext,
  instances: Instance[],
  configuration = haproxyOfReadme().byAgent
) {
  const front = await freePort()
  const nowhere = await freePort()
  const adapted = configuration
    .replace(/^( *bind) \S+/m, `$1 127.0.0.1:${front}`)
    .replace(/^( *timeout check) \S+/m, '$1 1s')
    .replace(/^ *option redispatch$/m, '$&\n    retries 0') // each waits a second
    .replace(/^( *server \D+(\d?)) \S+(.*)$/gm, (_, before: string, nth: string, after: string) => {
      const nobody = { instancePort: nowhere, port: nowhere + 80 }
      const { instancePort, port } = instances[Number(nth) - 1] ?? nobody
      return `${before} 127.0.0.1:${instancePort}${after.replace(/\bport \d+/g, `port ${port}`)}`
    })
    .replace(/ (inter|agent-inter) \S+/g, ' $1 100ms')
  return { front, ...(await startHaproxy(t, adapted)) }
}

/** HAProxys before one instance, of which the first one goes by its agent check, the second by
 *  tcp-check; and what waits until both have it in a state. */
async function balanceByBoth(t: TestContext, instance: Instance) {
  const { byAgent, byTcpCheck } = haproxyOfReadme()
  const startOne = (configuration: string) => balance(t, [instance], configuration)
  const haproxys = await Promise.all([startOne(byAgent), startOne(byTcpCheck)])
  const becomes = async (state: RegExp) => {
    for (const { untilState } of haproxys) await untilState('app1', state)
  }
  return { haproxys, becomes }
}

/** Asks for the front page by each of these clients, and keeps who served, and what failed. */
function keepLoading(t: TestContext, port: number, clients: PageOptions[]) {
  const served = new Map<string, number>()
  const failed: string[] = []
  const askOnce = async (client: PageOptions) => {
    const page = await getPage(port, '/', client).catch(codeOf)
    if (typeof page === 'string') failed.push(page)
    else if (page.status !== 200) failed.push(`${page.status} ${page.body}`)
    else served.set(page.body, (served.get(page.body) ?? 0) + 1)
  }
  const askers = clients.map((client) => keepAsking(t, 5, () => askOnce(client)))
  const stop = () => Promise.all(askers.map((asker) => asker.stop()))
  return { served, failed, stop }
}

/** Runs nginx with these servers, the first of which is at this port. */
async function startNginx(t: TestContext, port: number, servers: string): Promise<void> {
  const folder = scratchFolder(t)
  const kinds = ['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi']
  const configuration = `
    daemon off;
    master_process off;
    pid ${folder}/pid;
    events {}
    http {
      access_log off;
      ${kinds.map((kind) => `${kind}_temp_path ${folder}/${kind};`).join('\n      ')}
      ${servers}
    }`
  fs.writeFileSync(join(folder, 'nginx.conf'), configuration)
  const nginx = watch(t, 'nginx', ['-e', 'stderr', '-p', folder, '-c', 'nginx.conf'])
  const isRunning = async () => {
    assert.equal(nginx.child.exitCode, null, nginx.output)
    return !(await isRefused(port))
  }
  await until(isRunning, 'nginx runs')
  assert.doesNotMatch(nginx.output, /\[(warn|emerg|error)\]/)
}

const CONSOLES = README_TEXT.matchAll(/^```console\n([^]*?)^```$/gm)
// `$ printf … | nc …`, and the reply, up to the next command
const NC_COMMAND = /^\$ (.*\| *nc .*)\n((?!\$ )[^]*?)(?=^\$ |(?![^]))/gm

/** Commands and replies of the README's consoles, as far as nc asks for what is the same always. */
const TRANSCRIPT = [...CONSOLES]
  .flatMap(([, block = '']) => [...block.matchAll(NC_COMMAND)])
  .map(([, command = '', reply = '']) => ({ command, reply }))
  .filter(({ command }) => /health_check|warmup_state/.test(command))

const NEXT_ENVIRONMENT = { NEXT_TELEMETRY_DISABLED: '1', NODE_ENV: 'production' }

/** Builds a Next.js app of one page in a folder. */
async function buildNextApp(t: TestContext, folder: string): Promise<void> {
  const modules = join(PACKAGES ?? '', 'node_modules')
  fs.symlinkSync(modules, join(folder, 'node_modules'))
  fs.mkdirSync(join(folder, 'pages'))
  fs.writeFileSync(join(folder, 'package.json'), '{ "private": true }')
  const page = `
    import { createElement } from 'react'
    export default () => createElement('p', null, 'a page')
    export const getServerSideProps = async () => ({ props: {} })`
  fs.writeFileSync(join(folder, 'pages/index.js'), page)
  const words = [join(modules, 'next/dist/bin/next'), 'build', '--webpack']
  const options = { cwd: folder, env: NEXT_ENVIRONMENT }
  const { status, stdout, stderr } = await runToEnd(t, process.execPath, words, options)
  assert.equal(status, 0, stdout + stderr)
}

/** Programs from npm as they are: how each serves a folder, with which status it ends by SIGTERM,
 *  `null` where it dies of that, and what its own listener prints. */
const UNMODIFIED: [command: string, status: number | null, lastWords?: RegExp][] = [
  ['http-server/bin/http-server FOLDER -p PORT -a 127.0.0.1', 0, /http-server stopped/],
  ['json-server/lib/cli/bin.js --port PORT --host 127.0.0.1 FOLDER/db.json', null],
  ['serve/build/main.js -L -l tcp://127.0.0.1:PORT FOLDER', 0, /Gracefully shutting down/],
  ['fastify-cli/cli.js start -p PORT -a 127.0.0.1 FOLDER/plugin.cjs', 0],
  ['node-red/red.js -u FOLDER -p PORT', 0, /Stopped flows/],
  ['next/dist/bin/next start FOLDER -p PORT -H 127.0.0.1', 143]
]

describeProcesses('Real programs', SIDE_BY_SIDE, () => {
  test('the first service of the README logs what is printed there', async (t) => {
    const service = readmeBlock('js')
    const log = readmeBlock('', 'ftw-monitor listening')
    const port = await freePort()
    const file = join(scratchFolder(t), 'server.mjs')
    fs.writeFileSync(file, service.replace("'ftw-monitor'", JSON.stringify(MODULE.href)))
    const words = ['--no-warnings', file]
    const booted = watch(t, process.execPath, words, { env: { PORT: String(port) } })
    // Its times differ, and without IPv6 its address does.
    const comparable = (text: string) =>
      text.replace(/on \S+:/, 'on ADDRESS:').replace(/[\d.]+ s/g, '')
    await until(() => booted.output.includes('is healthy'), 'it has logged that it is healthy')
    assert.equal(comparable(booted.output), comparable(log.replace('8160', String(port + 80))))
    await untilHealthy(port + 80)
    assert.equal((await getPage(port, '/')).body, 'Hello\n')
    booted.child.kill('SIGTERM')
    assert.equal(await booted.exit, 0)
  })

  test('a warm-up of the README that hangs fails by its time limit, whatever is collected', async (t) => {
    const performer = readmeBlock('js', 'registerWarmup').replace(/^import .*$/m, '')
    assert.match(performer, / 60_000\)/)
    const script = `
      const { registerWarmup } = monitor
      const server = http.createServer(() => {})
      ${performer.replace('60_000', '500')}
      monitor.start(server)
      server.listen(Number(process.env.PORT), '127.0.0.1')
      setInterval(gc, 50)`
    const env = { PORT: String(await freePort()) }
    const booted = runScript(t, { script, env, flags: ['--expose-gc'] })
    const isFailed = () => booted.output.includes('is red: Warmup failed: /shop: it took a minute')
    await until(isFailed, 'the warm-up has failed')
  })

  test("systemd accepts the README's unit", needs('systemd-analyze'), async (t) => {
    const unit = readmeBlock('ini').replaceAll('/usr/bin/node ', `${process.execPath} `)
    const file = join(scratchFolder(t), 'web@.service')
    fs.writeFileSync(file, unit)
    const { status, stdout, stderr } = await runToEnd(t, 'systemd-analyze', ['verify', file])
    // It ignores a setting that it does not know, and says so.
    assert.deepEqual([status, stdout, stderr], [0, '', ''])
  })

  test("the README's nginx and Caddy pass by what hangs", needs('nginx', 'caddy'), async (t) => {
    const hosts = ['127.0.0.1', '127.0.0.2', '127.0.0.3']
    const port = await freePort()
    const script = `
      const server = http.createServer((_, response) => response.end(process.env.HOST))
      monitor.start(server)
      server.listen(Number(process.env.PORT), process.env.HOST)`
    const boot = (host: string) => runScript(t, { script, env: { HOST: host, PORT: String(port) } })
    const instances = hosts.map(boot)
    await until(() => instances.every(({ output }) => output.includes('is warm')), 'all are warm')

    const nginx = await freePort()
    const servers = readmeBlock('nginx')
      .replace('listen 8000;', `listen 127.0.0.1:${nginx}; proxy_read_timeout 500ms;`)
      .replace(/127\.0\.0\.1:1030(\d)/g, `127.0.0.$1:${port}`)
    await startNginx(t, nginx, servers)

    const caddy = await freePort()
    const caddyfile = readmeBlock('caddyfile')
      .replace(':8000', `http://127.0.0.1:${caddy}`)
      .replace(/10\.0\.0\.(\d):8080/g, `127.0.0.$1:${port}`)
      .replace('health_port 8160', `health_port ${port + 80}`)
      .replace('health_interval 2s', 'health_interval 200ms')
      .replace('health_timeout 2s', 'health_timeout 500ms')
    const folder = scratchFolder(t)
    fs.writeFileSync(join(folder, 'Caddyfile'), `{\n\tadmin off\n}\n${caddyfile}`)
    const env = { HOME: folder, XDG_DATA_HOME: folder, XDG_CONFIG_HOME: folder }
    const running = watch(t, 'caddy', ['run'], { cwd: folder, env })
    await until(async () => !(await isRefused(caddy)), 'Caddy runs')
    assert.doesNotMatch(running.output, /"level":"warn".*"adapter":"caddyfile"/)

    /** Which instances serve thirty visitors, `nobody` among them for those who wait in vain. */
    const whoServes = async (front: number) => {
      const visitors = Array.from({ length: 30 }, () => getPage(front, '/', { limitMs: 2_000 }))
      const bodies = visitors.map((page) => page.then(({ body }) => body).catch(() => 'nobody'))
      return [...new Set(await Promise.all(bodies))].sort().join()
    }
    const untilCaddyHas = async (served: string) => {
      await until(async () => (await whoServes(caddy)) === served, `they are ${served}`)
    }
    await untilCaddyHas(hosts.join())
    assert.equal(await whoServes(nginx), hosts.join())
    instances[1]!.child.kill('SIGSTOP')
    assert.equal(await whoServes(nginx), '127.0.0.1,127.0.0.3')
    await untilCaddyHas('127.0.0.1,127.0.0.3')
    instances[1]!.child.kill('SIGCONT')
    await untilCaddyHas(hosts.join())
  })

  test("at a signal to the README's primary its workers finish what they serve", async (t) => {
    const folder = scratchFolder(t)
    const port = await freePort()
    const primary = readmeBlock('js', 'cluster.isPrimary').replace('8160', String(port + 80))
    fs.writeFileSync(join(folder, 'primary.mjs'), primary.replace('server.js', 'server.mjs'))
    const worker = `
      import http from 'node:http'
      import { shutdownOnSignal, start } from ${JSON.stringify(MODULE.href)}
      const server = http.createServer(({ url }, response) => {
        if (url === '/') return response.end()
        console.log('asked')
        setTimeout(() => response.end('served'), 700)
      })
      start(server)
      shutdownOnSignal()
      server.listen(${port})`
    fs.writeFileSync(join(folder, 'server.mjs'), worker)
    const cluster = watch(t, process.execPath, ['--no-warnings', join(folder, 'primary.mjs')])
    const count = (text: string) => cluster.output.split(text).length - 1
    await until(() => count('is warm') === 3, 'all workers are warm')
    const pages = Array.from({ length: 12 }, () => getPage(port, '/slow'))
    await until(() => count('asked') === 12, 'all were asked')
    cluster.child.kill('SIGTERM')
    const bodies = (await Promise.all(pages)).map(({ body }) => body)
    assert.deepEqual(bodies, Array(12).fill('served'))
    assert.equal(await cluster.exit, 0, cluster.output)
  })

  test("with the README's recipe a fatal error costs its own request alone, and ends in 1", async (t) => {
    const recipe = readmeBlock('js', 'uncaughtException').replace(/^import .*$/m, '')
    const script = `
      const { shutdown, shutdownOnSignal } = monitor
      ${recipe}
      shutdownOnSignal({ cleanUp: () => print('cleaned up'), timeoutMs: 40_000 })
      server.on('request', ({ url }, response) => {
        if (url === '/crash') setTimeout(() => { throw new Error('half a cart') }, 10)
        else setTimeout(() => response.end('served'), url === '/slow' ? 2_000 : 0)
      })`
    const { watched, port, instancePort } = await bootProcess(t, { script })
    await probe(t, port)
    const slow = getPage(instancePort, '/slow')
    const crash = getPage(instancePort, '/crash')
    const crashedAt = performance.now()
    void crash.catch(() => {})
    await until(() => watched.stderr.includes('half a cart'), 'the error is told')
    assert.equal(await ask(port, 'health_check\n'), 'Crashed\n')
    assert.equal((await getPage(instancePort, '/')).body, 'served')
    assert.equal((await slow).body, 'served')
    await assert.rejects(crash)
    assert.equal(await watched.exit, 1, watched.output)
    assert.ok(performance.now() - crashedAt < 8_000)
    assert.match(watched.stdout, /^cleaned up$/m)
  })

  test("the README's rolling restart kills what hangs, waits for what warms up, and stops at what dies", async (t) => {
    const ports = [await freePort(), await freePort()] as const
    const [first, second] = ports
    const killAll = () => spawnSync('sh', ['-c', `kill -KILL ${ports.map(pidOf).join(' ')}`])
    t.after(() => void killAll()) // before the files of their ids are gone
    const folder = scratchFolder(t)
    const pidOf = (port: number) => fs.readFileSync(join(folder, `${port}.pid`), 'utf8').trim()
    const hung = watch(t, 'sh', ['-c', "trap '' TERM; echo hangs; exec sleep 1000"])
    await until(() => hung.output.includes('hangs'), 'it hangs')
    for (const port of ports) fs.writeFileSync(join(folder, `${port}.pid`), `${hung.child.pid}`)
    fs.writeFileSync(join(folder, `${first}.log`), 'what the last process said\n')

    const file = join(folder, 'server.mjs')
    const service = `
      import http from 'node:http'
      import * as monitor from ${JSON.stringify(MODULE.href)}
      const server = http.createServer((_, response) => response.end('hello'))
      monitor.start(server)
      monitor.shutdownOnSignal()
      server.listen(Number(process.env.PORT), '127.0.0.1')`
    fs.writeFileSync(file, service)
    const program = [process.execPath, ...programWords([])].map(quote).join(' ')
    const script = readmeBlock('sh', 'kill -TERM')
      .replace('10301 10302 10303', ports.join(' '))
      .replace('node server.js', `${quote(process.execPath)} server.mjs`)
      .replace('npx ftw-monitor', program)
      .replace('sleep 5', 'sleep 0')
    assert.match(script, /wait --port \$port --pid \$! \|\| exit 1/)
    const restart = async (tenths: number) => {
      const options = { cwd: folder, env: { HOST: '127.0.0.1' } }
      const shortened = script.replace('seq 35', `seq ${tenths}`).replace('sleep 1;', 'sleep 0.1;')
      const { status, stdout } = await runToEnd(t, 'sh', ['-c', shortened], options)
      return { status, stdout, pids: ports.map(pidOf) }
    }

    const begun = await inTime(restart(5), 'what hangs is replaced')
    assert.equal(begun.status, 0, begun.stdout)
    assert.match(begun.stdout, new RegExp(`^${first} hung: killed$`, 'm'))
    await inTime(hung.exit, 'the old process is gone')
    const log = fs.readFileSync(join(folder, `${first}.log`), 'utf8')
    assert.match(log, /^what the last process said\n[^]*is healthy after/)

    const well = await inTime(restart(350), 'all are restarted', 40_000)
    assert.equal(well.status, 0, well.stdout)
    assert.doesNotMatch(well.stdout, /hung/)
    for (const pid of well.pids) assert.ok(!begun.pids.includes(pid), well.pids.join())
    for (const port of ports) assert.equal(await ask(port + 80, 'health_check\n'), 'OK\n')

    fs.writeFileSync(file, 'process.exit(7)\n')
    const broken = await inTime(restart(350), 'it gives up', 40_000)
    assert.equal(broken.status, 1, broken.stdout)
    assert.match(broken.stdout, new RegExp(`^process ${pidOf(first)} is gone$`, 'm'))
    assert.equal(pidOf(second), well.pids[1])
    assert.equal(await ask(second + 80, 'health_check\n'), 'OK\n')
  })

  test('a rolling restart behind HAProxy loses no request', needs('haproxy'), async (t) => {
    const script = `
      let answer = 'cold'
      monitor.registerWarmup('/', async () => {
        await pause(300)
        answer = \`\${process.env.NAME} \${process.pid}\`
      })
      const server = http.createServer((_, response) => {
        const now = answer
        setTimeout(() => response.end(now), 20)
      })
      server.keepAliveTimeout = 60_000 // the balancer ends idle connections, or it may lose a race
      const upgraded = new Set()
      server.on('upgrade', (_, socket) => {
        upgraded.add(socket.on('error', () => {}))
        socket.write(${JSON.stringify(UPGRADED)})
      })
      const cleanUp = () => {
        for (const socket of upgraded) socket.end('goodbye')
      }
      monitor.start(server)
      monitor.shutdownOnSignal({ cleanUp })
      server.listen(Number(process.env.PORT), '127.0.0.1')`
    const launch = async (name: string, instancePort: number) => {
      const launched = runScript(t, { script, env: { NAME: name, PORT: String(instancePort) } })
      await untilHealthy(instancePort + 80)
      return { name, instancePort, port: instancePort + 80, ...launched }
    }
    const names = ['app1', 'app2']
    const instances = await Promise.all(names.map(async (name) => launch(name, await freePort())))
    const haproxy = await balance(t, instances)
    for (const name of names) await haproxy.untilState(name, /^UP$/)

    const agent = new http.Agent({ keepAlive: true })
    t.after(() => agent.destroy())
    const withCookies = names.flatMap((name) => {
      const headers = { Cookie: `app=${name}` }
      return [{ headers }, { headers, agent, method: 'POST', body: 'a=1' }]
    })
    const load = keepLoading(t, haproxy.front, [{}, { agent }, ...withCookies])
    const upgraded = [await upgradeTo(haproxy.front), await upgradeTo(haproxy.front)]
    t.after(() => upgraded.forEach(({ socket }) => socket.destroy()))
    await until(() => load.served.size === names.length, 'all of them serve')

    for (const old of instances) {
      old.child.kill('SIGTERM')
      const status = await inTime(old.exit, 'it ends')
      assert.deepEqual([status, linesOfShutdown(old.output)], [0, []], old.output)
      const { child } = await launch(old.name, old.instancePort)
      await haproxy.untilState(old.name, /^UP$/)
      await until(() => load.served.has(`${old.name} ${child.pid}`), 'it serves again')
    }
    await load.stop()
    assert.deepEqual(load.failed, [])
    assert.equal(load.served.size, 2 * names.length, [...load.served.keys()].join())
    for (const { text } of upgraded) assert.equal(text, 'goodbye')
  })

  test('HAProxy weights a busy instance least', { ...SLOW, ...needs('haproxy') }, async (t) => {
    const script = `
      let isBusy = false
      const work = () => {
        for (const end = performance.now() + 20; performance.now() < end;);
        if (isBusy) setTimeout(work, 1)
      }
      server.on('request', ({ url }, response) => {
        isBusy = url === '/busy'
        if (isBusy) work()
        response.end()
      })`
    const instance = await bootProcess(t, { script, flags: [flagForPace(25)] })
    const { untilState } = await balance(t, [instance])
    await untilState('app1', /^([89]\d|100)$/, 'weight')
    await getPage(instance.instancePort, '/busy')
    await untilState('app1', /^10$/, 'weight')
    await getPage(instance.instancePort, '/relax')
    await untilState('app1', /^([89]\d|100)$/, 'weight')
  })

  test('promtool has nothing to remark on metrics', needs('promtool'), async (t) => {
    const { monitor, port } = await bootInstance(t, { until: 'started' })
    const check = (input: string) => runToEnd(t, 'promtool', ['check', 'metrics'], { input })
    const nothing = { status: 0, stdout: '', stderr: '' }
    assert.deepEqual(await check(await ask(port, 'metrics\n')), nothing)
    for (const name of ['main', 'a"b', 'c\\d', 'e\\"f', 'größe', '{x="y"}', '😀']) {
      monitor.registerDatabase(name, { isConnected: () => name !== 'main' }).loads(1.5e21)
    }
    assert.deepEqual(await check(await ask(port, 'metrics\n')), nothing)
  })

  test("the README's alerts fire, and not for a drain", needs('promtool'), async (t) => {
    const scrape = async ({ main = true, mail = true, drained = false, sites = WARM } = {}) => {
      const databases = { main: { isConnected: () => main } }
      const setup = { databases, performers: sites, until: 'started' } as const
      const { monitor, port } = await bootInstance(t, setup)
      const isWarm = async () => (await ask(port, 'warmup_state\n')) === '1 0\n'
      if (sites === WARM) await until(isWarm, 'it is warm')
      monitor.registerCheck('mail', () => mail, { optional: true })
      if (drained) void monitor.drain()
      return readSamples(await ask(port, 'metrics\n'))
    }
    const healthy = await scrape()
    const scrapes: Record<string, Record<string, number | string>> = {
      healthy,
      drained: await scrape({ main: false, drained: true }),
      broken: await scrape({ main: false }),
      'without-mail': await scrape({ mail: false }),
      failed: await scrape({ sites: { '/': () => Promise.reject(new Error('no stock')) } }),
      hung: {
        ...(await scrape({ sites: { '/': () => {}, '/shop': hang } })),
        'ftw_monitor_warmup_seconds{site="/shop"}': '0+60x30',
        'ftw_monitor_warmup_seconds{site="/"}': 2
      },
      // For half an hour, minute by minute:
      blocked: { ...healthy, ftw_monitor_eventloop_lag_seconds: '1.2x30' },
      failing: {
        ...healthy,
        ftw_monitor_http_requests_total: '0+100x30',
        ftw_monitor_http_errors_total: '0+6x30'
      },
      gone: { up: '1 0x29' },
      restarted: { up: '1x10 0 1x19' }
    }

    const rules = readmeBlock('yaml', 'alert: InstanceRed')
    for (const name of rules.match(/\bftw_monitor_\w+/g) ?? []) {
      const isTold = Object.keys(healthy).some((sample) => sample.replace(/\{.*/, '') === name)
      assert.ok(isTold, name)
    }
    const series = Object.entries(scrapes).flatMap(([instance, samples]) =>
      Object.entries({ up: 1, ...samples }).map(([sample, value]) => {
        const [, name = '', labels = ''] = /^(\w+)(?:\{(.*)\})?$/.exec(sample) ?? []
        const own = `job="web",instance="${instance}"`
        const values = typeof value === 'string' ? value : `${value}x30`
        return { series: `${name}{${[own, labels].filter(Boolean).join()}}`, values }
      })
    )
    const firing = (eval_time: string, alerts: Record<string, object[]>) =>
      [...rules.matchAll(/alert: (\w+)/g)].map(([, alertname = '']) => {
        const labels = alerts[alertname] ?? []
        const exp_alerts = labels.map((each) => ({ exp_labels: { job: 'web', ...each } }))
        return { eval_time, alertname, exp_alerts }
      })
    const afterAll = {
      InstanceGone: [{ instance: 'gone' }],
      InstanceRed: [{ instance: 'broken' }, { instance: 'failed' }, { instance: 'hung' }],
      DatabaseDown: [{ instance: 'broken', database: 'main' }],
      OptionalDown: [{ instance: 'without-mail', check: 'mail', optional: 'true' }],
      WarmupHangs: [{ instance: 'hung', site: '/shop' }],
      EventLoopBlocked: [{ instance: 'blocked' }],
      Errors: [{ instance: 'failing' }]
    }
    const { InstanceGone, DatabaseDown, EventLoopBlocked } = afterAll
    const alert_rule_test = [
      ...firing('30s', {}),
      ...firing('4m', { InstanceGone, DatabaseDown, EventLoopBlocked }),
      ...firing('12m', { ...afterAll, OptionalDown: [] }),
      ...firing('29m', afterAll)
    ]
    const folder = scratchFolder(t)
    fs.writeFileSync(join(folder, 'rules.yml'), rules)
    const unitTest = { interval: '1m', input_series: series, alert_rule_test }
    const tests = { rule_files: ['rules.yml'], evaluation_interval: '30s', tests: [unitTest] }
    fs.writeFileSync(join(folder, 'tests.yml'), JSON.stringify(tests))
    const tried = await runToEnd(t, 'promtool', ['test', 'rules', 'tests.yml'], { cwd: folder })
    assert.equal(tried.status, 0, tried.stdout + tried.stderr)
  })

  test("the README's HAProxy takes out what hangs alone", needs('haproxy'), async (t) => {
    const instancePort = await freePort()
    const script = `
      const server = http.createServer((request, response) => {
        response.writeHead(request.url === '/' ? 200 : 404).end('hello')
      })
      monitor.start(server)
      server.listen(${instancePort}, '127.0.0.1')`
    const first = runScript(t, { script })
    const { haproxys, becomes } = await balanceByBoth(t, { instancePort, port: instancePort + 80 })
    await becomes(/^UP/)
    first.child.kill('SIGSTOP')
    await becomes(/^DOWN/)
    first.child.kill('SIGCONT')
    await becomes(/^UP/)
    for (const { front } of haproxys) assert.equal((await getPage(front, '/')).body, 'hello')

    const [byAgent] = haproxys
    const commands = readmeBlock('', 'disable agent').replace('10301', String(instancePort))
    for (const command of commands.trim().split('\n')) await byAgent.command(command)
    first.child.kill('SIGKILL')
    await byAgent.untilState('app1', /^DOWN/)
    runScript(t, { script, env: { FTW_MONITOR: '0', FTW_MONITOR_HEALTH_PATH: '/readyz' } })
    await byAgent.untilState('app1', /^UP/)
    assert.equal((await getPage(byAgent.front, '/')).body, 'hello')
  })

  test("the README's HAProxy goes by the verdict alone", needs('haproxy'), async (t) => {
    let warmUp: () => void = () => {
      throw new Error('OK\nOK')
    }
    let isConnected = true
    const check = t.mock.fn(() => isConnected)
    const { server, held, letGo } = await serveHeld(t)
    const { monitor, ...instance } = await bootInstance(t, {
      server,
      databases: { main: { isConnected: check } },
      performers: { '/': () => warmUp() },
      until: 'started'
    })
    const { haproxys, becomes } = await balanceByBoth(t, instance)
    await untilVerdict(monitor, /^Warmup failed/)
    await becomes(/^DOWN/)
    const before = check.mock.callCount()
    await until(() => check.mock.callCount() >= before + 8, 'more checks have come')
    for (const { front, stateOf } of haproxys) {
      assert.match(await stateOf('app1'), /^DOWN/)
      assert.notEqual((await getPage(front, '/')).body, 'served')
    }
    warmUp = () => {}
    await becomes(/^UP/)

    isConnected = false
    await becomes(/^DOWN/)
    isConnected = true
    await becomes(/^UP/)
    for (const { front } of haproxys) {
      const visitors = Array.from({ length: 20 }, () => getPage(front, '/held'))
      await until(() => held.length === 20, 'no visitor waits in HAProxy').finally(letGo)
      for (const { status } of await Promise.all(visitors)) assert.equal(status, 200)
      const { status, body } = await getPage(front, '/@@warmup')
      assert.equal(status, 403)
      assert.match(body, /administrative rules/) // by HAProxy: the instance is not asked
    }
  })

  test('a drained instance gets no request once HAProxy knows', needs('haproxy'), async (t) => {
    const { server, held, letGo } = await serveHeld(t)
    const arrive = t.mock.fn()
    server.on('request', arrive)
    const { monitor, ...first } = await bootInstance(t, { server })
    const second = await bootInstance(t, { server: (await serveHeld(t)).server })
    const haproxy = await balance(t, [first, second])
    await haproxy.untilState('app1', /^UP$/)
    const headers = { Cookie: 'app=app1' }
    const agent = new http.Agent({ keepAlive: true })
    t.after(() => agent.destroy())
    const load = keepLoading(t, haproxy.front, [{}, { headers }, { headers, agent }])
    const untilServed = async (count: number) => {
      const served = () => load.served.get('served') ?? 0
      const before = served()
      await until(() => served() >= before + count, `${count} more are served`)
    }

    const late = getPage(haproxy.front, '/held', { headers })
    await until(() => held.length === 1, 'a request is in flight')
    await untilServed(60)
    const reason = 'maint drain ready up 100% #down' // which are orders to HAProxy, where no reason
    const drained = monitor.drain({ reason })
    await haproxy.untilState('app1', /^DOWN \(agent\)$/)
    await haproxy.untilState('app1', /stopped \(maint drain ready up 100% #down\)$/, 'last_agt')
    await untilServed(6) // those that were under way
    const last = arrive.mock.callCount()
    await untilServed(60)
    assert.equal(arrive.mock.callCount(), last)
    assert.match(await haproxy.stateOf('app1'), /^DOWN \(agent\)$/)
    assert.ok(await isPendingFor(0, drained))
    letGo()
    const { status, body } = await late
    assert.deepEqual([status, body], [200, 'late'])
    await drained

    const order = (state: string) => haproxy.command(`set server app/app1 state ${state}`)
    await order('maint')
    monitor.resume()
    await haproxy.untilState('app1', /up$/, 'last_agt')
    assert.match(await haproxy.stateOf('app1'), /^MAINT/)
    assert.equal(arrive.mock.callCount(), last)
    await order('ready')
    await until(() => arrive.mock.callCount() > last, 'requests come back')
    await load.stop()
    assert.deepEqual(load.failed, [])
  })

  test('no visitor behind nginx has an instance warm up again', needs('nginx'), async (t) => {
    const { calls, performers } = recordSites('/')
    const { instancePort } = await bootInstance(t, { performers })
    const front = await freePort()
    const pass = `proxy_pass http://127.0.0.1:${instancePort}; proxy_http_version 1.0;`
    await startNginx(t, front, `server { listen 127.0.0.1:${front}; location / { ${pass} } }`)
    assert.equal((await getPage(front, '/')).body, 'hello')
    assert.equal((await getPage(front, '/@@warmup')).status, 403)
    assert.deepEqual(calls, ['/']) // at boot
    assert.equal((await getPage(instancePort, '/@@warmup')).status, 200)
  })

  test('everything works without IPv6', { ...SLOW, ...NEEDS_NAMESPACES }, async (t) => {
    const script = `
      import { execFile, execFileSync } from 'node:child_process'
      const server = http.createServer((_, response) => response.end('hello'))
      const logger = { info() {}, warn: print, error: print }
      const warmUp = async (what, options) => {
        await monitor.stop()
        monitor.start({ logger, ...options })
        await monitor.untilHealthy({ signal: AbortSignal.timeout(10_000) })
        print(what, (await monitor.status()).url)
      }
      server.listen(21000)
      await warmUp('by itself', { server })
      monitor.registerWarmup('/', async ({ url }) => await (await fetch(url)).text())
      monitor.registerWarmup('/shop', ({ url }) => new Promise((resolve, reject) => {
        http.get(url, (page) => page.resume().on('end', resolve)).on('error', reject)
      }))
      await warmUp('by performers', { server })
      process.env.PORT = '21000'
      await warmUp('by PORT and HOST')
      const view = await fetch('http://localhost:21000/shop/@@warmup')
      print('by the view', (await view.text()).trim())
      const words = ['--no-warnings', ${JSON.stringify(PROGRAM)}, 'health_check', '--port', '21000']
      const [error, reply] = await new Promise((resolve) => {
        execFile(process.execPath, words, (...answer) => resolve(answer))
      })
      print('by the program', error?.code ?? 0, reply.trim())

      await warmUp('elsewhere', { listen: { host: '10.0.0.5', port: 21080 } })
      await pause(1_200) // so that it is tried again in vain
      const heard = new Promise((resolve) => { logger.info = resolve })
      execFileSync('ip', ['addr', 'add', '10.0.0.5/32', 'dev', 'lo'])
      print(await heard)
      process.exit()`
    for (const isDisabled of [1, 0]) {
      const network = `sysctl -qw net.ipv6.conf.all.disable_ipv6=${isDisabled}`
      const under = ['unshare', ...NETWORK, network]
      const instance = runScript(t, { script, env: { HOST: '::' }, under })
      await inTime(instance.exit, 'it ends', 60_000)
      const advice = /(?<=EADDRNOTAVAIL).*(?=; tries every second; )|(?<=second; ).*/g
      assert.deepEqual(instance.output.replace(advice, '').split('\n'), [
        'by itself http://localhost:21000',
        'by performers http://localhost:21000',
        'by PORT and HOST http://localhost:21000',
        'by the view Warmup successful',
        'by the program 0 OK',
        'ftw-monitor cannot listen: listen EADDRNOTAVAIL; tries every second; ',
        'elsewhere http://localhost:21000',
        'ftw-monitor listening on 10.0.0.5:21080',
        ''
      ])
    }
  })

  test("Prometheus takes prom-client's metrics", { ...SLOW, ...NEEDS_PROMETHEUS }, async (t) => {
    const { monitor, port } = await bootInstance(t, { performers: WARM })
    const client = createRequire(`${PACKAGES}/`)('prom-client')
    client.collectDefaultMetrics()
    const help = 'Of {the} "shop"\nor \\ so'
    const bytes = new client.Summary({ name: 'shop_bytes', help, labelNames: ['path'] })
    for (const path of ['a"b', 'back\\slash', 'new\nline', 'ü{x="y"} 1', '\n# TYPE a b']) {
      bytes.observe({ path }, 3)
    }
    monitor.registerMetrics(() => client.register.metrics())

    const folder = scratchFolder(t)
    const apiPort = await freePort()
    const scraping = readmeBlock('yaml', 'scrape_configs')
      .replace('15s', '1s\n    scrape_timeout: 1s')
      .replace(/targets: .*/, `targets: ['127.0.0.1:${port}']`)
    fs.writeFileSync(join(folder, 'prometheus.yml'), scraping)
    const words = ['--config.file=prometheus.yml', '--storage.tsdb.path=data']
    words.push(`--web.listen-address=127.0.0.1:${apiPort}`)
    watch(t, 'prometheus', words, { cwd: folder })
    const valueOf = async (name: string) => {
      const page = await getPage(apiPort, `/api/v1/query?query=${name}`).catch(() => undefined)
      if (page?.status !== 200) return undefined
      return JSON.parse(page.body).data.result[0]?.value[1]
    }
    await until(async () => (await valueOf('up')) === '1', 'it is up', 20_000)
    assert.equal(await valueOf('ftw_monitor_healthy'), '1')
    assert.equal(await valueOf('shop_bytes_count'), '1')
  })

  const frameworks: Record<string, string> = {
    Express: `
      import express from 'express'
      server = express().get('/slow500', handle).listen(0, '127.0.0.1')
      listen = () => {}
      const app = server`,
    Koa: `
      import Koa from 'koa'
      const answer = async ({ req, res }) => handle(req, res)
      server = http.createServer(new Koa().use(answer).callback())
      const app = server`,
    Fastify: `
      import Fastify from 'fastify'
      const app = Fastify()
      app.get('/slow500', async (request, reply) => {
        reply.hijack()
        await handle(request.raw, reply.raw)
      })
      server = app.server
      listen = () => app.listen({ port: 0, host: '127.0.0.1' })`,
    Nest: `
      import 'reflect-metadata'
      import { NestFactory } from '@nestjs/core'
      import { Module } from '@nestjs/common'
      class App {}
      Module({})(App)
      const app = await NestFactory.create(App, { logger: false })
      app.use(handle)
      server = app.getHttpServer()
      listen = () => app.listen(0, '127.0.0.1')`
  }
  for (const [name, beginning] of Object.entries(frameworks)) {
    const how = name === 'Fastify' ? NEEDS_PACKAGES : { ...SLOW, ...NEEDS_PACKAGES }
    test(`${name} ends by SIGTERM, though a client keeps a connection`, how, async (t) => {
      const script = `
        ${beginning}
        server.on('upgrade', (request, socket) => {
          socket.on('error', () => {}).write(${JSON.stringify(UPGRADED)})
        })
        options.cleanUp = async () => {
          cleanUp()
          await app.close()
          print('closed')
        }`
      const { instancePort, endWhileServing } = await bootService(t, { cwd: PACKAGES!, script })
      const peer = await upgradeTo(instancePort)
      t.after(() => peer.socket.destroy())
      const { status, ms, output } = await endWhileServing(instancePort, '/slow500')
      assert.deepEqual([status, linesOfShutdown(output)], [0, []], output)
      assert.match(output, /\nclosed\n/)
      assert.ok(ms > 1_990, `${ms} ms`)
    })
  }

  test("WebSockets of ws get the README's goodbye", needsPackage('ws'), async (t) => {
    const goodbye = readmeBlock('js', 'webSockets.clients')
    const script = `
      import { WebSocketServer } from 'ws'
      const webSockets = new WebSocketServer({ server })
      const pool = { end: cleanUp }
      ${goodbye.replace('shutdownOnSignal', 'options = ')}`
    const service = await bootService(t, { cwd: PACKAGES!, script })
    const { WebSocket } = createRequire(`${PACKAGES}/`)('ws')
    const client = new WebSocket(`ws://127.0.0.1:${service.instancePort}`)
    const closed = once(client, 'close')
    await once(client, 'open')
    const { status, output } = await service.end()
    assert.deepEqual([status, (await closed)[0]], [0, 1001], output)
  })

  for (const [command, status, lastWords = /^/] of UNMODIFIED) {
    const [name = ''] = command.split('/')
    const how = { ...SLOW, ...needsPackage(name), timeout: 180_000 }
    test(`${name} as it is has a monitor, and ends without a lost request`, how, async (t) => {
      const folder = scratchFolder(t)
      if (name === 'next') await buildNextApp(t, folder)
      fs.writeFileSync(join(folder, 'db.json'), '{ "posts": [] }')
      const plugin = "module.exports = async (app, _) => app.get('/', async () => 'a page')"
      fs.writeFileSync(join(folder, 'plugin.cjs'), plugin)
      const port = await freePort()
      const adapted = command.replace('FOLDER', folder).replace('PORT', String(port))
      const [file = '', ...words] = adapted.split(' ')
      const program = join(PACKAGES ?? '', 'node_modules', file)
      const env = {
        ...NEXT_ENVIRONMENT,
        PORT: String(port),
        FTW_MONITOR: 'auto',
        FTW_MONITOR_TIMEOUT_MS: '4000',
        NODE_OPTIONS: `--no-warnings --import=${MODULE.href}`
      }
      const watched = watch(t, process.execPath, [program, ...words], { cwd: folder, env })
      await untilHealthy(port + 80, 60_000)
      const before = await askRequests(port + 80)
      assert.equal((await getPage(port, '/')).status, 200)
      assert.equal((await askRequests(port + 80)) - before, 1)

      await endUnderLoad(t, watched, { port, path: '/' })
      assert.equal(await watched.exit, status, watched.output)
      assert.match(watched.output, lastWords)
    })
  }

  test('the demo answers nc and curl as the README says', needs('nc', 'curl'), async (t) => {
    const port = await freePort()
    const demo = startProgram(t, ['demo'], { PORT: String(port) })
    const shell = async (command: string) => {
      const adapted = command.replaceAll('8160', String(port + 80))
      const { status, stdout, stderr } = await runToEnd(t, 'sh', ['-c', adapted])
      assert.equal(status, 0, `${command}: ${stdout}${stderr}`)
      return stdout + stderr
    }
    await until(() => demo.output.includes('warms up'), 'the demo warms up')
    const isEarly = ({ reply }: { reply: string }) => reply === 'Warmup in progress\n'
    assert.ok(TRANSCRIPT.some(isEarly) && TRANSCRIPT.length >= 3)
    for (const { command, reply } of TRANSCRIPT.filter(isEarly)) {
      assert.equal(await shell(command), reply)
    }
    assert.equal((await getPage(port, '/')).status, 200)
    await untilHealthy(port + 80, 30_000)
    for (const { command, reply } of TRANSCRIPT.filter((each) => !isEarly(each))) {
      assert.equal(await shell(command), reply)
    }
    demo.child.kill('SIGTERM')
    assert.equal(await inTime(demo.exit, 'it ends'), 0, demo.output)
  })

  test("the README's PostgreSQL and Redis", { ...SLOW, ...NEEDS_DATABASES }, async (t) => {
    t.after(() => stopPostgres().catch(() => {})) // before its folder is removed; it may be stopped
    const folder = scratchFolder(t)
    const NOBODY = 65_534
    const isRoot = process.getuid?.() === 0
    const user = isRoot ? { uid: NOBODY, gid: NOBODY } : {} // PostgreSQL does not run as root
    if (isRoot) fs.chownSync(folder, NOBODY, NOBODY)
    const run = async (name: string, ...words: string[]) => {
      const program = join(POSTGRES_FOLDER ?? '', name)
      const ran = await runToEnd(t, program, words, { cwd: folder, ...user })
      assert.equal(ran.status, 0, ran.stdout + ran.stderr)
    }
    const postgresPort = String(await freePort())
    const settings = `-k ${folder} -c listen_addresses=127.0.0.1 -p ${postgresPort} -c fsync=off`
    const stopPostgres = () => run('pg_ctl', 'stop', '-D', 'data', '-m', 'immediate')
    const startPostgres = () => run('pg_ctl', 'start', '-D', 'data', '-l', 'log', '-o', settings)
    await run('initdb', '-D', 'data', '-U', 'postgres', '-A', 'trust', '--no-sync', '--no-locale')
    await startPostgres()

    const redisPort = String(await freePort())
    const words = ['--port', redisPort, '--bind', '127.0.0.1', '--save', '']
    const redis = watch(t, 'redis-server', words, { cwd: folder })
    await until(() => redis.output.includes('Ready to accept connections'), 'Redis runs')

    const withRedis = readmeBlock('js', 'createClient')
    const recipe = readmeBlock('js', 'import pg from')
      .replace("'ftw-monitor'", JSON.stringify(MODULE.href))
      .replace('SELECT version()', '$& FROM pg_sleep(1.2)')
      .replace(/^shutdownOnSignal.*\n/m, withRedis)
      .replace('createClient({', `$& url: 'redis://127.0.0.1:${redisPort}',`)
    assert.match(recipe, /pg_sleep[^]* url: [^]*pool\.end\(\), redis\.close\(\)/)
    fs.symlinkSync(join(PACKAGES!, 'node_modules'), join(folder, 'node_modules'))
    const file = join(folder, 'server.mjs')
    fs.writeFileSync(file, recipe)
    const port = await freePort()
    const client = { PGHOST: '127.0.0.1', PGPORT: postgresPort, PGUSER: 'postgres' }
    const env = { ...client, PORT: String(port) }
    const service = watch(t, process.execPath, [file], { env })
    await untilHealthy(port + 80)

    // Many more slow queries than the pool has connections.
    const reply = () => ask(port + 80, 'health_check\n')
    const reasons = new Set<string>()
    const prober = keepAsking(t, 50, async () => reasons.add(await reply()))
    const pages = await Promise.all(Array.from({ length: 25 }, () => getPage(port, '/')))
    await prober.stop()
    assert.deepEqual([...reasons], ['OK\n'])
    for (const { status } of pages) assert.equal(status, 200)

    await stopPostgres()
    await until(async () => (await reply()).startsWith("Error: Database 'main' "), 'it is red')
    await startPostgres()
    await untilHealthy(port + 80)
    redis.child.kill()
    await until(async () => (await reply()).startsWith("Error: Database 'sessions' "), 'it is red')
    service.child.kill('SIGTERM')
    assert.equal(await inTime(service.exit, 'it ends'), 0, service.output)
  })
})

describeProcesses('Real programs', ALONE, () => {
  // tsx kills a child that takes more than 60 ms to hear of a signal.
  test('under tsx a service serves and ends as by itself', needsPackage('tsx'), async (t) => {
    const tsx = createRequire(`${PACKAGES}/`).resolve('tsx/cli')
    const service = await bootService(t, { flags: [tsx], script: 'process.exitCode = 6' })
    const { status, output } = await service.endWhileServing(service.instancePort, '/slow600')
    assert.match(output, /cleaned up/)
    assert.equal(status, 6)
  })
})

// --- Attacks and limits --------------------------------------------------------------------------

/** What a browser says of a page of another origin. */
const CROSS_SITE = {
  'User-Agent': 'Mozilla/5.0',
  Origin: 'https://evil.example',
  'Sec-Fetch-Site': 'cross-site'
}

/** What such a page would have run. */
const ORDERS = 'drain\ndrain now\r\ninteractive\nown\nnear\nresume\n'
const TEMPTING_PATHS =
  '/drain /drain/now /resume /interactive /quit /own /near /%64rain //drain /./drain /drain? ' +
  '/drain%0A /%0Adrain%0A /@@warmup /health_check /'

describeProcesses('Attacks and limits', PAIRWISE, () => {
  test('no command and no path tells a stranger what was thrown', async (t) => {
    const url = 'postgres://user:SECRET@SECRET.internal/SECRET'
    const fail = (): never => {
      const error = new RangeError(`at ${url} /SECRET/path 10.0.0.7:5432`)
      error.name = 'SECRETError'
      throw Object.defineProperty(error, 'code', { value: 'SECRET' })
    }
    const failLater = async () => fail()
    let isConnected: () => boolean = fail
    const connections = () => [{ openedAt: 0, info: url }]
    const { monitor, port, instancePort } = await bootInstance(t, {
      handler: () => {},
      databases: {
        main: { isConnected: () => isConnected() },
        spare: { optional: true, isConnected: failLater, connections: fail, figures: fail },
        open: { isConnected: () => true, connections, figures: failLater }
      },
      performers: { '/': fail },
      prepare: ({ register, registerCheck, registerMetrics }) => {
        registerCheck('disk', fail, { optional: true })
        registerMetrics(fail)
        register('fails', 'Fails', fail, { http: true })
        register('rejects', 'Rejects', failLater, { http: true })
        register('odd', 'Returns no mode', (() => url) as () => void, { http: true })
      },
      until: 'started'
    })
    const inFlight = await converse(t, instancePort)
    inFlight.say(headOf('/SECRET/path?SECRET'))
    const hasFailed = async () => (await monitor.status()).warmup[0]?.status === 'failed'
    await until(hasFailed, 'the warm-up has failed')

    const help = await ask(port, 'help\n')
    const listed = Array.from(help.matchAll(/^  (\S+) --/gm), ([, name]) => name!)
    const ending = listed.filter((name) => name !== 'interactive')
    const asked: { text: string; stranger: string; local: string }[] = []
    const askAll = async (rest: string) => {
      const names = [...ending, 'readyz', 'livez', '', '@@warmup', 'nope']
      const paths = names.map((name) => `/${name}${rest}`)
      const lines = paths.map((path) => path.replaceAll('/', ' ').trim()).filter(Boolean)
      const browser = ['User-Agent: Mozilla/5.0', 'Sec-Fetch-Site: same-origin']
      const texts = [
        ...lines.map((line) => `${line}\n`),
        ...paths.map((path) => headOf(path, 'Connection: close')),
        headOf('/', 'Connection: close', 'Accept: text/html'),
        headOf('/?pause', 'Connection: close', 'Accept: text/html', ...browser),
        'interactive\nmonitor 0 open\nfails\nstatus\nquit\n'
      ]
      const askBoth = async (text: string) => {
        const stranger = await askBehind(port, PROXY_HEADERS['version 1']!, text)
        const isSafe = !/^(drain|resume|warmup)/.test(text)
        asked.push({ text, stranger, local: isSafe ? await ask(port, text) : '' })
      }
      await Promise.all(texts.map(askBoth))
    }
    for (const rest of ['', '/main', '/open', '/0', '/0/spare', '/0/open']) await askAll(rest)
    isConnected = () => true
    await askAll('')

    assert.ok(asked.length > 300, `${asked.length} replies`)
    for (const { text, stranger, local } of asked) {
      const what = `${JSON.stringify(text)}: ${stranger}`
      assert.notEqual(stranger, '', what)
      assert.doesNotMatch(stranger, /SECRET|127\.0\.0\.1 |10\.0\.0\.7|\.[cm]?[jt]s:\d/, what)
      assert.doesNotMatch(local, /user:/, text)
    }
    const repliesTo = (line: string) => asked.filter(({ text }) => text === `${line}\n`)
    const strangersTold = (line: string) => repliesTo(line).map(({ stranger }) => stranger)
    const verdicts = ["Error: Database 'main' failed.\n", 'Warmup failed\n']
    assert.deepEqual(strangersTold('health_check'), verdicts)
    assert.deepEqual(strangersTold('fails'), Array(2).fill('Error: fails failed\n'))

    // This machine is told, without the password.
    const told = ['health_check', 'agent_check', 'status', 'fails', 'dbinfo open', 'monitor 0']
    for (const line of told) {
      assert.ok(repliesTo(line).length > 0, line)
      for (const { local } of repliesTo(line)) assert.match(local, /SECRET/, line)
    }
  })

  test('nothing that a page of another origin has a browser send changes an instance, whatever its length', async (t) => {
    const act = t.mock.fn(() => {})
    const { monitor, port, instancePort } = await bootInstance(t, { performers: { '/': act } })
    monitor.register('own', 'Own', act)
    monitor.register('near', 'Near', act, { local: true })
    act.mock.resetCalls()
    const expectUnchanged = async (what: string) => {
      assert.deepEqual(await monitor.health(), { healthy: true, reason: 'OK' }, what)
      assert.equal(act.mock.callCount(), 0, what)
      assert.equal(await ask(port, 'warmup_state\n'), '1 0\n', what)
      const client = { headers: { Connection: 'keep-alive' } }
      const { headers } = await getPage(instancePort, '/', client)
      assert.equal(headers.connection, 'keep-alive', what)
    }

    const preflight = { ...CROSS_SITE, 'Access-Control-Request-Method': 'DRAIN' }
    const chunked = { ...CROSS_SITE, 'Transfer-Encoding': 'chunked' }
    for (const path of TEMPTING_PATHS.split(' ')) {
      for (const options of [
        { headers: CROSS_SITE },
        { headers: preflight, method: 'OPTIONS' },
        { headers: CROSS_SITE, method: 'POST', body: ORDERS },
        { headers: chunked, method: 'POST', body: ORDERS }
      ]) {
        const { headers } = await getPage(port, path, options)
        assert.doesNotMatch(Object.keys(headers).join(), /access-control-/, path)
      }
      await expectUnchanged(path)
    }

    const lines = Object.entries(CROSS_SITE).map(([name, value]) => `${name}: ${value}`)
    const post = (path: string) =>
      headOf(path, ...lines, `Content-Length: ${ORDERS.length}`).replace('GET', 'POST') + ORDERS
    const almostHttp = [
      'drain / HTTP/1.1',
      'drain  /  HTTP/1.1',
      'drain / http/1.1',
      'near\t/ HTTP/1.1 ',
      'drain / HTTP/2.0',
      'resume HTTP/1.1'
    ]
    const longPaths = [4_000, 4_090, 9_000, 200_000].map(
      (length) => `/drain/${'%0Adrain%0A'.repeat(length / 10)}`
    )
    const transcripts = [
      post('/').repeat(5),
      headOf('/drain', ...lines, 'Connection: Upgrade', 'Upgrade: websocket') + ORDERS,
      `\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n${ORDERS}`, // TLS whose session is text
      ...almostHttp.map((line) => `${line}\r\nHost: example.com\r\n\r\ndrain\r\n`),
      ...longPaths.flatMap((path) => [headOf(path, ...lines), post(path)])
    ]
    for (const text of transcripts) {
      await ask(port, text, { end: true, limitMs: 500 }).catch(() => {}) // it may be reset
      await expectUnchanged(text.slice(0, 100))
    }
  })

  test('control characters from outside come back in no reply, and forge no line of the log', async (t) => {
    const forged = `${EVIL}\nftw-monitor forged\n    at forged (frame)\n    at forged (${EVIL}:1:2)`
    const fail = (error: unknown) => {
      throw error
    }
    const { monitor, port, logger } = await bootInstance(t, {
      performers: { '/': () => fail(new Error(forged)) },
      databases: {
        main: {
          isConnected: () => fail(new Error(forged)),
          connections: () => [{ openedAt: 0, info: forged }]
        }
      },
      until: 'started'
    })
    const stack = `Error: x\nforged\n    at ${EVIL}\n${EVIL}`
    const echo = (_: unknown, ...words: unknown[]) => fail(new Error(words.join(' ')))
    monitor.register('echo', '', echo, { http: true })
    monitor.register('thrown', '', () => fail(forged))
    monitor.register('named', '', () => fail(Object.assign(new Error('x'), { name: forged })))
    monitor.register('stacked', '', () => fail(Object.assign(new Error('x'), { stack })))
    const hasFailed = () => logger.lines.some((line) => line.includes('tries again'))
    await until(hasFailed, 'the warm-up has failed')

    const head = headOf(`/echo/${encodeURIComponent(forged)}`, 'Connection: close')
    assert.doesNotMatch((await ask(port, head)).replace(/[\r\n]/g, ''), UNSAFE)
    const evil = EVIL.replace(/[\u2028\r]/g, '')
    const texts = ['nope', 'echo ', 'help ', 'dbinfo ', 'dbinfo main ', 'monitor ', 'interactive ']
    const failing = ['thrown', 'named', 'stacked']
    const telling = ['monitor 0 main', 'health_check', 'agent_check', 'perf_metrics']
    const evilLines = [...texts.map((text) => text + evil), `nope${EVIL}`, evil]
    for (const line of [...evilLines, ...failing, ...telling]) {
      const reply = await ask(port, `interactive\n${line}\nquit\n`)
      assert.doesNotMatch(reply.replace(/[\n\t]/g, ''), UNSAFE, line)
      assert.doesNotMatch(reply, /^(ftw-monitor )?forged/m, line)
    }
    assert.equal(errorsOf(logger).length, 4)
    for (const logged of logger.lines) {
      const [first = '', ...frames] = logged.split('\n')
      for (const line of [first, ...frames]) assert.doesNotMatch(line, UNSAFE)
      for (const frame of frames) assert.match(frame, /^ +at (?!forged)/, logged)
    }
  })

  test('a line of 100 MiB, a client that never reads, and lines behind a command that hangs cost the host no memory', async (t) => {
    const { port } = await bootProcess(t, MEASURED)
    const before = await askMemory(port)
    const grown = async () => (await askMemory(port)) - before
    /** Sends so many bytes, as far as they are taken. */
    const pour = async ({ socket }: Peer, block: string, bytes: number) => {
      for (let sent = 0; sent < bytes && !socket.destroyed; sent += block.length) {
        await new Promise((resolve) => socket.write(block, resolve))
      }
    }

    for (const [beginning, reply] of [
      ['', /^Line too long\n$/],
      ['GET /', /^HTTP\/1\.1 431 /]
    ] as const) {
      const peer = await converse(t, port, { allowHalfOpen: true })
      peer.say(beginning)
      await pour(peer, 'a'.repeat(65_536), 104_857_600)
      await until(() => peer.transcript !== '' || peer.isClosed, 'it is refused')
      if (peer.transcript !== '' || beginning === '') assert.match(peer.transcript, reply)
      await until(async () => (await grown()) < 10_000_000, 'what was read is free again')
      assert.equal(await ask(port, 'health_check\n'), 'OK\n')
      peer.socket.destroy()
    }

    for (const [beginning, request] of [
      ['interactive\n', 'big\n'],
      ['interactive\nnever\n', 'health_check\n'],
      ['', headOf('/help')]
    ] as const) {
      const peer = await converse(t, port)
      peer.socket.pause().write(beginning)
      void pour(peer, request.repeat(10_000), 20_000_000)
      let taken = -1
      const isStuck = async () => {
        const earlier = taken
        for (let turn = 0; turn < 5; turn++) await untilSeen(port)
        taken = peer.socket.bytesWritten - peer.socket.writableLength
        return taken === earlier
      }
      await until(isStuck, `no more ${request} is taken`)
      assert.equal(await ask(port, 'health_check\n'), 'OK\n')
      const bytes = await grown()
      assert.ok(bytes < 3_000_000, `${bytes} bytes more`)
      peer.socket.destroy()
    }
  })

  test('without a free descriptor status(), metrics and monitor tell what they can', async (t) => {
    const under = ['sh', '-c', 'ulimit -n 200; exec "$@"', 'sh']
    const script = `
      import * as fs from 'node:fs'
      monitor.register('fill', '', async (peer) => {
        try {
          for (;;) fs.openSync('/dev/null')
        } catch {}
        const { residentMemoryBytes, healthy } = await monitor.status()
        peer.write('memory ' + residentMemoryBytes + ', healthy ' + healthy + '\\n')
      })`
    const { port } = await bootProcess(t, { under, script })
    const text = await ask(port, 'interactive\nfill\nmonitor\nmetrics\nperf_metrics\nquit\n')
    assert.match(text, /\nmemory -1, healthy true\n0\nVmRSS:\t/)
    assert.match(text, /\nftw_monitor_healthy 1\n/)
    assert.match(text, /"memory":\{("\w+":-1[,}]){7}/)
    assert.doesNotMatch(text, /Error/)
  })

  test('who is connected keeps no process alive', async (t) => {
    const script = `monitor.register('leave', '', () => void server.unref())`
    const { watched, port } = await bootProcess(t, { script })
    const peer = await converse(t, port)
    peer.say('interactive\n')
    await peer.hear(INTERACTIVE)
    await ask(port, 'leave\n')
    assert.equal(await inTime(watched.exit, 'the process ends'), 0, watched.output)
  })

  test('a shutdown whose cleanUp hangs exits after 28 s by default', SLOW, async (t) => {
    const script = 'options = { cleanUp: () => new Promise(() => {}) }'
    const service = await bootService(t, { script })
    const { status, ms, output } = await service.end('SIGTERM', 60_000)
    const exits = 'ftw-monitor exits after 28 s; cleanUp did not finish'
    assert.deepEqual([status, linesOfShutdown(output)], [1, [exits]])
    assert.ok(ms > 27_900, `${ms} ms`)
  })
})

describeProcesses('Attacks and limits', ALONE, () => {
  test('the 257th is answered: the address with the most loses what was idle longest, else its oldest', async (t) => {
    const HELD = 256 // is how many connections a monitor holds
    const timers = takeTimers(t)
    const { monitor, port } = await bootInstance(t, { performers: WARM })
    const hanging = t.mock.fn(hang)
    monitor.register('hang', '', hanging)
    const many = (count: number, from: string) =>
      Promise.all(Array.from({ length: count }, () => converse(t, port, { from })))
    const modest = await many(100, '127.0.0.1')
    await untilSeen(port)
    timers.pass(1_000)
    const [active, idle] = (await many(2, '127.0.0.2')) as [Peer, Peer]
    await untilSeen(port)
    active.say('interactive\n')
    await until(() => active.transcript.endsWith('exit.\n'), 'it is interactive')
    timers.pass(1_000)
    const greedy = await many(HELD - 102, '127.0.0.2')
    active.socket.write('health_check\n')
    await until(() => active.transcript.endsWith('OK\n'), 'it is answered')
    assert.equal(await ask(port, 'health_check\n'), 'OK\n')
    await until(() => idle.isClosed, 'the one that was idle longest is closed')
    const others = [...modest, ...greedy]
    assert.ok([active, ...others].every(({ isClosed }) => !isClosed))

    for (const { socket } of [active, ...others]) socket.write('hang\n')
    await until(() => hanging.mock.callCount() === HELD - 1, 'all of them run')
    const last = await converse(t, port, { from: '127.0.0.2' })
    last.say('hang\n')
    await until(() => hanging.mock.callCount() === HELD, 'none is idle')
    assert.equal(await ask(port, 'health_check\n'), 'OK\n')
    await until(() => active.isClosed, 'the oldest is closed')
    assert.ok([last, ...others].every(({ isClosed }) => !isClosed))
  })
})

// --- Endurance -----------------------------------------------------------------------------------

/** Commands, heads of requests and greetings of other protocols, whole and in part. */
const KNOWN_BYTES = [
  'flow\n',
  'interactive\nhealth_check\n',
  '\r\n\nquit',
  'GET /health_check HTTP/1.1\r\nHost: a\r\n',
  'Content-Length: 9\r\n\r\n',
  'Transfer-Encoding: chunked\r\n\r\nfff\r\n',
  'Connection: Upgrade\r\nUpgrade: h2c\r\n',
  'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n',
  'CONNECT a:1 HTTP/1.1\r\n\r\n',
  '\x16\x03\x01',
  'GET /../..//help?%0a HTTP/1.1\r\n\r\n'
]

/** Sends noise and known bytes, piece by piece, and resets the connection, in the middle of the reply
 *  or after the last piece, or takes what comes until its end. */
async function sendHostile(port: number, from: string, random: () => number): Promise<void> {
  const socket = connectTo(port, { from })
  const closed = new Promise((resolve) => socket.on('close', resolve))
  socket.on('error', () => {})
  socket.setTimeout(20_000, () => socket.destroy())
  socket.resume()
  const fate = random()
  if (fate < 0.25) socket.once('data', () => socket.resetAndDestroy())
  for (let pieces = Math.floor(random() * 8); pieces > 0 && !socket.destroyed; pieces--) {
    const length = Math.floor(random() ** 3 * 600)
    const noise = Array.from({ length }, () => Math.floor(random() * 256))
    const known = KNOWN_BYTES[Math.floor(random() * KNOWN_BYTES.length)]!
    const bytes = Buffer.from(random() < 0.5 ? noise : known)
    const end = Math.ceil(bytes.length * random() * 2) // half of them are cut short
    await new Promise((resolve) => socket.write(bytes.subarray(0, end), resolve))
  }
  if (fate > 0.5) socket.resetAndDestroy()
  else socket.end()
  await closed
}

describeProcesses('Endurance', ALONE, () => {
  test('after many requests, aborted ones among them, none is counted in flight', async (t) => {
    const PIPELINED = 100
    const total = IS_SLOW_WANTED ? 100_000 : 3_000
    let held = 0
    const server = await serve(t, ({ url }, response) => {
      if (url === '/hold') held++
      else response.end()
    })
    const { port } = await bootInstance(t, { performers: WARM, server })
    const rest = headOf('/').repeat(PIPELINED - 1)
    const last = headOf('/', 'Connection: close')
    for (let sent = 0; sent < total; sent += 10 * PIPELINED) {
      const whole = Array.from({ length: 9 }, () => ask(portOf(server), rest + last))
      const aborted = connectTo(portOf(server), {}).on('error', () => {})
      const before = held
      aborted.write(headOf('/hold') + rest)
      for (const transcript of await Promise.all(whole)) {
        assert.equal(transcript.match(/HTTP\/1.1 200 OK/g)?.length, PIPELINED)
      }
      await until(() => held > before, 'the one to be aborted has come')
      aborted.resetAndDestroy()
    }
    await until(async () => (await askMonitor(port, '0')).count === 0, 'none is in flight')
    const { in_flight, requests } = JSON.parse(await ask(port, 'perf_metrics\n')).http
    assert.equal(in_flight, 0)
    assert.ok(requests > total * 0.9 && requests <= total, `${requests} counted`)
  })

  test('many rounds of start and stop leave the server exactly the listeners it had', async (t) => {
    const rounds = IS_SLOW_WANTED ? 1_000 : 100
    const server = await serve(t)
    server.on('upgrade', () => {})
    const emit = server.emit
    const facts = () => ({
      own: Object.getOwnPropertyNames(server).sort(),
      same: server.emit === emit,
      listeners: server.eventNames().map((name) => [name, server.rawListeners(name)]),
      process: process.eventNames().map((name) => [name, process.listenerCount(name)])
    })
    const before = facts()
    const { monitor } = await bootInstance(t, { performers: WARM, server })
    await monitor.stop()
    const descriptors = descriptorsOf('self')
    const timers = process.getActiveResourcesInfo().length
    for (let round = 0; round < rounds; round++) {
      await bootInstance(t, { monitor, server, until: 'started' })
      assert.notEqual(server.emit, emit)
      await monitor.stop()
    }
    assert.deepEqual(facts(), before)
    await until(() => descriptorsOf('self') <= descriptors + 2, 'all sockets are closed')
    await until(() => process.getActiveResourcesInfo().length <= timers + 4, 'no timer is left')
    assert.equal((await getPage(portOf(server), '/')).status, 200)
  })

  test('hostile connections of random bytes, reset at every moment, harm nobody', async (t) => {
    const total = IS_SLOW_WANTED ? 20_000 : 500
    const script = `
      monitor.register('flow', '', async (connection) => {
        for (let count = 0; count < 100; count++) {
          connection.write('flowing '.repeat(100))
          await nextTurn()
        }
      })`
    const { port, instancePort, watched } = await bootProcess(t, { script })
    const pid = watched.child.pid!
    const before = descriptorsOf(pid)
    let begun = 0
    const sendMany = async (_: unknown, client: number) => {
      const random = seeded(client)
      while (begun < total) {
        begun++
        await sendHostile(port, `127.0.0.${2 + (client % 4)}`, random)
      }
    }
    await Promise.all(Array.from({ length: 50 }, sendMany))
    assert.equal(await ask(port, 'health_check\n'), 'OK\n')
    assert.equal((await getPage(instancePort, '/')).status, 200)
    await until(() => descriptorsOf(pid) <= before, 'all connections are closed')
    assert.equal(watched.output.replace(/^ports.*\n/, ''), '', 'nothing is logged')
    assert.equal(watched.child.exitCode, null)
  })

  test('after 20,000 checks memory no longer grows', { ...SLOW, timeout: 600_000 }, async (t) => {
    const { port } = await bootProcess(t, MEASURED)
    const check = async (count: number) => {
      const askOn = () => askTimes(count / 32, port, 'health_check\n')
      await Promise.all(Array.from({ length: 32 }, askOn))
      assert.equal(await ask(port, 'health_check\n'), 'OK\n')
    }
    await check(20_000)
    const early = await askMemory(port)
    await check(180_000)
    const grown = (await askMemory(port)) - early
    assert.ok(grown < 5_000_000, `${grown} bytes more`)
  })
})

describeAllProcesses()
