// Random lives of an instance, each lived twice, with the monitor and without it, and compared:
// `npm run lives -- --lives 200 --seed 7`.
//
// The law that is tried: whatever a program does without us, it does with us; it only does it
// later, or better. A life is drawn from its name, as `7:13`, and from nothing else. What fails is
// printed with that name, and `npm run lives -- --seed 7:13` lives it alone.
//
//   --lives N       how many (default: 60)
//   --seed S        a number, or the name of one life (default: 1)
//   --jobs J        how many at the same time (default: 3)
//   --runtime PATH  what runs the program: node, bun or deno (default: the node of the trial)
//   --monitor PATH  the compiled module (default: dist/monitor.js)
//   --show          prints the events of each life, and keeps the files of the run
//
// The sections: Chance, The life, The program, Requests and their answers, Clients of HTTP/1,
// Clients of HTTP/2, Upgraded connections, Probers, Living it, Judging it, The run.

import { execFileSync, spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import {
  closeSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readFileSync,
  rmSync,
  writeSync
} from 'node:fs'
import * as http from 'node:http'
import * as http2 from 'node:http2'
import * as https from 'node:https'
import * as net from 'node:net'
import { tmpdir } from 'node:os'
import { basename, join, resolve } from 'node:path'
import process from 'node:process'
import { setImmediate as nextTurn, setTimeout as pause } from 'node:timers/promises'
import * as tls from 'node:tls'
import { fileURLToPath, pathToFileURL } from 'node:url'
import { promisify } from 'node:util'

import type { WebServer } from '../monitor.ts'

const HOST = '127.0.0.1'
const HEALTH_PATH = '/ready'
const PROGRAM = 'program' // the first argument of the process that is the instance
const OWN_STATUS = 7 // with which a program ends that decides it
const TIMEOUT_MS = 6_000 // for draining and the requests in flight
const EXIT_AFTER_MS = 8_000 // for everything, in code
const OTHERS_MS = 5_000 // that other listeners have at least, in code
const BOOT_MS = 10_000 // for the program to listen, on a busy machine
const SLACK_MS = 3_000 // for the goodbye of upgraded connections, and a busy machine
const PATIENCE_MS = TIMEOUT_MS + 1_500 // after the signal, of clients whose answer never ends
const UNCOMPARED_MS = TIMEOUT_MS + 3_500 // after the signal a life without us is killed
const SIGNAL_GRACE_MS = 60 // from a signal until the program has heard of it
const CLIENT_GRACE_MS = 300 // for a client and its peer to part, or to hear of one another
const LAST_READ_MS = 2_000 // after the end of the instance, for its clients to read what it sent
const DISAGREEMENT_MS = 700 // in more time than that there may be a change, and one back
const FIRST_PORT = 10_000 // below those of the tests, and of clients

// --- Chance --------------------------------------------------------------------------------------

// All that is random in a life comes from here, so that its name tells it all.

/** Mulberry32: small, and good enough to draw lots. */
class Chance {
  #state: number

  constructor(name: string) {
    let hash = 2_166_136_261 // FNV-1a
    for (const character of name) {
      hash = Math.imul(hash ^ character.charCodeAt(0), 16_777_619)
    }
    this.#state = hash >>> 0
  }

  /** From 0 to below 1. */
  fraction(): number {
    this.#state = (this.#state + 0x6d2b79f5) >>> 0
    let mixed = this.#state
    mixed = Math.imul(mixed ^ (mixed >>> 15), mixed | 1)
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4_294_967_296
  }

  /** A whole number, both ends included. */
  between(lowest: number, highest: number): number {
    return lowest + Math.floor(this.fraction() * (highest - lowest + 1))
  }

  isOneIn(count: number): boolean {
    return this.between(1, count) === 1
  }

  /** One of a list; what stands there twice comes twice as often. */
  oneOf<T>(all: readonly T[]): T {
    const one = all[this.between(0, all.length - 1)]
    if (one === undefined) throw new Error('nothing to choose from')
    return one
  }
}

// --- The life ------------------------------------------------------------------------------------

// What is drawn: a description, in words, of the program, of its clients and of its end.

/** `two` are two servers of HTTP; `fd` is a socket that the program inherits, `shared fd` one that
 *  another process holds, too. */
type ServerKind = 'http' | 'https' | 'h2' | 'h2c' | 'two' | 'unix' | 'fd' | 'shared fd'

/** What the program's own listener of the signal does. `signal-exit` counts the listeners, and
 *  raises the signal again where it is the only one left. */
type ListenerKind =
  | 'none'
  | 'close and once'
  | 'close event'
  | 'exits unless listening'
  | 'bound close'
  | 'prototype close'
  | 'close callback'
  | 'async dispose'
  | 'raises again'
  | 'signal-exit'
  | 'flushes'

type CleanUpKind = 'none' | 'quick' | 'slow' | 'throws' | 'endless'

type ClientKind =
  | 'fresh'
  | 'keep-alive'
  | 'pipelined'
  | 'slow reader'
  | 'upload'
  | 'early'
  | 'endless'
  | 'upgraded'
  | 'sessions'

type ProberKind = 'none' | 'all' | 'line' | 'http' | 'agent' | 'path' | 'vanishes'

/** When the first signal comes: the program raises it itself in its first moments (`up`), in the
 *  turn in which it begins to listen for signals (`heard`), when all is prepared but it serves
 *  nobody yet (`armed`), or as soon as it does (`bound`). While it serves, it comes from
 *  outside. */
type Moment = 'up' | 'heard' | 'armed' | 'bound' | 'serving'

interface Client {
  kind: ClientKind
  /** Since the program listens. */
  startsMs: number
  pauseMs: number
  /** Since the signal: a router sends no more then. */
  stopsMs: number
  /** The second of two servers. */
  isOfSecond: boolean
}

interface Life {
  name: string
  /** `auto`: the program knows nothing of the monitor, which is preloaded. */
  way: 'code' | 'auto'
  server: ServerKind
  listener: ListenerKind
  isListenerFirst: boolean
  isListenerOnce: boolean
  /** What it does when its servers are closed. */
  afterwards: 'exits' | 'sets exitCode' | 'ends'
  /** How long its own clean-up takes after that. */
  ownCleanUpMs: number
  cleanUp: CleanUpKind
  startAt: 'before listen' | 'after listen' | 'after connections'
  /** What `shutdownOnSignal` is told to listen for. */
  handled: NodeJS.Signals[]
  database: 'none' | 'up' | 'fails'
  warmUp: 'none' | 'quick' | 'slow' | 'fails once'
  /** Since it listens: the event loop stands still. */
  blockAtMs: number
  blockMs: number
  prober: ProberKind
  proberPauseMs: number
  clients: Client[]
  moment: Moment
  signal: NodeJS.Signals
  /** Since it listens, where the moment is `serving`. */
  signalAtMs: number
  second: NodeJS.Signals | 'none'
  /** Since the first signal. */
  secondAfterMs: number
  /** The monitor is switched off: nobody can ask, and the end is the same. */
  isOff: boolean
}

const SERVERS: ServerKind[] = [
  'http',
  'http',
  'http',
  'https',
  'h2',
  'h2c',
  'two',
  'unix',
  'fd',
  'shared fd'
]

const LISTENERS: ListenerKind[] = [
  'none',
  'close and once',
  'close event',
  'exits unless listening',
  'bound close',
  'prototype close',
  'close callback',
  'async dispose',
  'raises again',
  'signal-exit',
  'flushes'
]

const HTTP1_CLIENTS: ClientKind[] = [
  ...Array<ClientKind>(5).fill('fresh'),
  ...Array<ClientKind>(5).fill('keep-alive'),
  'pipelined',
  'slow reader',
  'upload',
  'early',
  'upgraded',
  'pipelined',
  'slow reader',
  'upload',
  'early',
  'endless',
  'upgraded'
]

const PROBERS: ProberKind[] = ['none', 'none', 'all', 'all', 'line', 'http', 'agent', 'path']
const PROBERS_MORE: ProberKind[] = [...PROBERS, 'vanishes']
const MOMENTS: Moment[] = [
  ...Array<Moment>(20).fill('serving'),
  'up',
  'heard',
  'armed',
  'armed',
  'bound',
  'bound'
]

/** Bun and Deno cannot listen on what they inherit, and the HTTP/2 of Deno aborts the process by
 *  itself. */
function serverFor(drawn: ServerKind, runtime: 'node' | 'bun' | 'deno'): ServerKind {
  if (runtime === 'node') return drawn
  const isInherited = drawn === 'fd' || drawn === 'shared fd'
  const isAborting = runtime === 'deno' && (drawn === 'h2' || drawn === 'h2c')
  return isInherited || isAborting ? 'http' : drawn
}

/** We have to close a server of Bun by its `close()`; one that was bound at boot knows nothing of
 *  that. */
function listenerFor(drawn: ListenerKind, runtime: 'node' | 'bun' | 'deno'): ListenerKind {
  const isBound = drawn === 'bound close' || drawn === 'prototype close'
  return runtime === 'bun' && isBound ? 'close callback' : drawn
}

function drawLife(name: string, runtime: 'node' | 'bun' | 'deno'): Life {
  const chance = new Chance(name)
  const way = chance.oneOf(['code', 'auto'] as const)
  const server = serverFor(chance.oneOf(SERVERS), runtime)
  const signal = drawSignal(chance)
  const moment = chance.oneOf(MOMENTS)
  const signalAtMs = chance.between(150, 1_600)
  const isBlocked = chance.isOneIn(5)
  return {
    name,
    way,
    server,
    listener: listenerFor(chance.oneOf(LISTENERS), runtime),
    isListenerFirst: chance.isOneIn(2),
    isListenerOnce: chance.isOneIn(2),
    afterwards: chance.oneOf(['exits', 'sets exitCode', 'ends'] as const),
    ownCleanUpMs: chance.oneOf([0, 0, 300]),
    cleanUp: drawCleanUp(chance, way),
    startAt: chance.oneOf(['before listen', 'after listen', 'after connections'] as const),
    handled: drawHandled(chance, way, signal),
    database: way === 'auto' ? 'none' : chance.oneOf(['none', 'up', 'fails'] as const),
    warmUp:
      way === 'auto' ? 'none' : chance.oneOf(['none', 'quick', 'slow', 'fails once'] as const),
    blockAtMs: isBlocked ? Math.max(0, signalAtMs + chance.between(-400, 200)) : 0,
    blockMs: isBlocked ? chance.between(200, 700) : 0,
    prober: chance.oneOf(PROBERS_MORE),
    proberPauseMs: chance.oneOf([100, 150, 500]),
    clients: drawClients(chance, server, runtime),
    moment,
    signal,
    signalAtMs,
    second: chance.isOneIn(4) ? chance.oneOf(['SIGTERM', 'SIGINT', signal] as const) : 'none',
    secondAfterMs: chance.oneOf([1, 60, 500, 1_200, 2_000]),
    isOff: way === 'code' && chance.isOneIn(5)
  }
}

function drawSignal(chance: Chance): NodeJS.Signals {
  const rare: NodeJS.Signals[] = ['SIGHUP', 'SIGUSR2', 'SIGINT']
  return chance.isOneIn(4) ? chance.oneOf(rare) : chance.oneOf(['SIGTERM', 'SIGTERM', 'SIGINT'])
}

/** The program of `auto` cleans up in its own listener alone. */
function drawCleanUp(chance: Chance, way: 'code' | 'auto'): CleanUpKind {
  if (way === 'auto') return 'none'
  if (chance.isOneIn(8)) return 'endless'
  return chance.oneOf(['none', 'quick', 'quick', 'slow', 'throws'])
}

function drawHandled(
  chance: Chance,
  way: 'code' | 'auto',
  signal: NodeJS.Signals
): NodeJS.Signals[] {
  const usual: NodeJS.Signals[] = ['SIGTERM', 'SIGINT']
  if (way === 'auto' || usual.includes(signal) || chance.isOneIn(3)) return usual
  return [...usual, signal]
}

function drawClients(
  chance: Chance,
  server: ServerKind,
  runtime: 'node' | 'bun' | 'deno'
): Client[] {
  const clients: Client[] = []
  const count = chance.between(1, 5)
  for (let index = 0; index < count; index++) {
    clients.push({
      kind: clientFor(drawClientKind(chance, server), runtime),
      startsMs: chance.between(0, 600),
      pauseMs: chance.oneOf([0, 0, 30, 80, 250]),
      stopsMs: chance.oneOf([0, 300, 1_000, 2_500]),
      isOfSecond: server === 'two' && chance.isOneIn(2)
    })
  }
  return clients
}

/** What has been read with a request is known on Node.js alone, so that an answer there may close the
 *  connection before the next one is seen. */
function clientFor(drawn: ClientKind, runtime: 'node' | 'bun' | 'deno'): ClientKind {
  return runtime !== 'node' && drawn === 'pipelined' ? 'keep-alive' : drawn
}

function drawClientKind(chance: Chance, server: ServerKind): ClientKind {
  const speaksHttp2 = server === 'h2' || server === 'h2c'
  const kind = chance.oneOf(HTTP1_CLIENTS)
  // Most of one that speaks HTTP/2 is to be that; without TLS it speaks nothing else.
  const takesSessions = speaksHttp2 && (server === 'h2c' || !chance.isOneIn(4))
  return takesSessions ? 'sessions' : kind
}

/** One line for people. */
function describeLife(life: Life): string {
  const { way, server, listener, cleanUp, startAt, database, warmUp, blockMs, prober } = life
  const order = life.isListenerFirst ? 'first' : 'second'
  const takes = life.isListenerOnce ? 'once' : 'on'
  const parts = [`${way}, ${server}`]
  if (listener === 'none') parts.push('no listener')
  else parts.push(`listener: ${listener} (${order}, ${takes}; ${life.afterwards})`)
  if (way === 'code') {
    parts.push(`start ${startAt}`, `cleanUp ${cleanUp}`, `database ${database}`)
    parts.push(`warm-up ${warmUp}`, `handles ${life.handled.join(' ')}`)
    if (life.isOff) parts.push('switched off')
  }
  if (blockMs > 0) parts.push(`blocked for ${blockMs} ms at ${life.blockAtMs}`)
  parts.push(prober === 'none' ? 'no prober' : `prober ${prober} each ${life.proberPauseMs} ms`)
  const clients = life.clients.map(({ kind, stopsMs }) => `${kind} (until +${stopsMs})`)
  parts.push(`clients: ${clients.join(', ')}`)
  const when = life.moment === 'serving' ? `at ${life.signalAtMs} ms` : `when ${life.moment}`
  parts.push(`${life.signal} ${when}`)
  if (life.second !== 'none') parts.push(`${life.second} ${life.secondAfterMs} ms later`)
  return parts.join('; ')
}

/** Whether ours hears the first signal, where it was begun before. */
function isSignalOurs({ handled, signal }: Life): boolean {
  return handled.includes(signal)
}

// --- The program ---------------------------------------------------------------------------------

// The instance, a process of its own. What happens in it it reports to its standard output, a
// file, as lines of JSON after a mark: so nothing is lost that a dying process had said.

/** What the program is told in its environment. */
interface Setup {
  life: Life
  isWithUs: boolean
  monitor: string
  port: number
  secondPort: number
  monitorPort: number
  socketPath: string
  keyFile: string
  certFile: string
}

type EventKind =
  | 'up'
  | 'armed'
  | 'listens for signals'
  | 'listening'
  | 'started'
  | 'raised'
  | 'blocked'
  | 'unblocked'
  | 'got'
  | 'done'
  | 'listener begin'
  | 'listener end'
  | 'cleanUp begin'
  | 'cleanUp end'
  | 'verdict'
  | 'failed'
  | 'exit'

interface ProgramEvent {
  atMs: number
  kind: EventKind
  /** Of a request its id, of a verdict the way it was asked. */
  detail: string
  /** Of a verdict. */
  isGreen?: boolean
  askedAtMs?: number
}

const MARK = '@@ '

function report(kind: EventKind, detail = '', more: Partial<ProgramEvent> = {}): void {
  const event: ProgramEvent = { atMs: Date.now(), kind, detail, ...more }
  writeSync(1, `${MARK}${JSON.stringify(event)}\n`)
}

/** The part of the monitor's module that a program uses. */
type Monitor = typeof import('../monitor.ts')

class Program {
  readonly life: Life
  readonly servers: WebServer[]
  readonly #setup: Setup
  /** As some programs do it at boot. */
  readonly #boundCloses: (() => Promise<unknown>)[]
  readonly #upgraded = new Set<net.Socket>()
  #hasCleanedUp = false
  #isDatabaseUp = true

  constructor(setup: Setup) {
    this.#setup = setup
    this.life = setup.life
    this.servers = this.#createServers()
    this.#boundCloses = this.servers.map((server) => promisify(server.close.bind(server)))
  }

  async run(): Promise<void> {
    const { life } = this
    report('up')
    process.on('exit', (status) => report('exit', String(status)))
    this.#raiseAt('up')

    const monitor = await this.#findMonitor()
    const listensFirst = life.isListenerFirst
    if (listensFirst) this.#listenForSignals()
    this.#raiseAt('heard')
    if (monitor) this.#shutDownWith(monitor)
    // In auto ours listens when the server does, so that the second one waits for that.
    if (!listensFirst && life.way === 'code') this.#listenForSignals()
    if (life.startAt === 'before listen') this.#startWith(monitor)
    report('armed')
    this.#raiseAt('armed')
    if (life.moment === 'armed') await pause(50) // the signal comes before the port is open

    await this.#listen()
    report('listening')
    this.#raiseAt('bound')
    if (life.startAt === 'after listen') this.#startWith(monitor)
    this.#blockLater()
    if (!listensFirst && life.way === 'auto') {
      await pause(20)
      this.#listenForSignals()
    }
    if (life.startAt !== 'after connections') return
    await pause(250, undefined, { ref: false })
    this.#startWith(monitor)
  }

  #raiseAt(moment: Moment): void {
    if (this.life.moment !== moment) return
    report('raised')
    process.kill(process.pid, this.life.signal)
  }

  #blockLater(): void {
    const { blockAtMs, blockMs } = this.life
    if (blockMs === 0) return
    const block = (): void => {
      report('blocked')
      const sinceMs = performance.now()
      while (performance.now() - sinceMs < blockMs) continue
      report('unblocked')
    }
    setTimeout(block, blockAtMs).unref()
  }

  // What it serves

  #createServers(): WebServer[] {
    const { server } = this.life
    const serve = (request: http.IncomingMessage, response: http.ServerResponse): void => {
      this.#serve(request, response)
    }
    const serveHttp2 = serve as unknown as (
      request: http2.Http2ServerRequest,
      response: http2.Http2ServerResponse
    ) => void
    const servers: WebServer[] = []
    if (server === 'https') servers.push(https.createServer(this.#secrets(), serve))
    else if (server === 'h2') {
      const options = { ...this.#secrets(), allowHTTP1: true }
      servers.push(http2.createSecureServer(options, serveHttp2))
    } else if (server === 'h2c') servers.push(http2.createServer(serveHttp2))
    else servers.push(http.createServer(serve))
    if (server === 'two') servers.push(http.createServer(serve))
    for (const each of servers) {
      each.on('upgrade', (request: http.IncomingMessage, socket: net.Socket) => {
        this.#upgrade(request, socket)
      })
    }
    return servers
  }

  #secrets(): { key: Buffer; cert: Buffer } {
    const { keyFile, certFile } = this.#setup
    return { key: readFileSync(keyFile), cert: readFileSync(certFile) }
  }

  async #listen(): Promise<void> {
    const { port, secondPort, socketPath } = this.#setup
    const [first, second] = this.servers
    const { server } = this.life
    if (server === 'unix') first?.listen({ path: socketPath })
    else if (server === 'fd' || server === 'shared fd') first?.listen({ fd: 3 })
    else first?.listen({ host: HOST, port })
    second?.listen({ host: HOST, port: secondPort })
    for (const each of this.servers) {
      if (!each.listening) await once(each, 'listening')
    }
  }

  #serve(request: http.IncomingMessage, response: http.ServerResponse): void {
    const [, kind = '', id = ''] = (request.url ?? '/').split('/')
    if (id === '') {
      response.end('front page')
      return
    }
    report('got', id)
    response.on('finish', () => report('done', id))
    const answer = (body = bodyOf(kind as RequestKind, id)): void => {
      response.statusCode = this.#hasCleanedUp ? 500 : 200
      response.end(this.#hasCleanedUp ? 'the database is closed' : body)
    }
    if (kind === 'slow') setTimeout(answer, SLOW_MS)
    else if (kind === 'streamed') void this.#stream(response, bodyOf(kind, id))
    else if (kind === 'upload') this.#receive(request, answer)
    else if (kind === 'endless') this.#answerForEver(response)
    else answer()
    request.resume() // what is answered early, too, is read to its end
  }

  async #stream(response: http.ServerResponse, body: string): Promise<void> {
    const size = Math.ceil(body.length / STREAM_PARTS)
    for (let start = 0; start < body.length; start += size) {
      response.write(body.slice(start, start + size))
      await pause(STREAM_PAUSE_MS)
    }
    response.end()
  }

  #receive(request: http.IncomingMessage, answer: () => void): void {
    let received = 0
    request.on('data', (chunk: Buffer) => {
      received += chunk.length
    })
    request.on('end', () => {
      if (received === UPLOAD_PARTS * UPLOAD_PART.length) answer()
      else request.destroy()
    })
  }

  #answerForEver(response: http.ServerResponse): void {
    const timer = setInterval(() => response.write('more\n'), STREAM_PAUSE_MS)
    response.on('close', () => clearInterval(timer))
  }

  /** Each line that comes is sent back. */
  #upgrade(request: http.IncomingMessage, socket: net.Socket): void {
    const [, , id = ''] = (request.url ?? '/').split('/')
    report('got', id)
    socket.on('error', doNothing)
    socket.on('close', () => this.#upgraded.delete(socket))
    socket.on('end', () => socket.end())
    socket.write('HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n')
    socket.on('data', (chunk: Buffer) => socket.write(chunk))
    this.#upgraded.add(socket)
  }

  // The monitor

  async #findMonitor(): Promise<Monitor | undefined> {
    const { isWithUs, monitor } = this.#setup
    if (!isWithUs || this.life.way === 'auto') return undefined
    const { database, warmUp } = this.life
    const module = (await import(pathToFileURL(monitor).href)) as Monitor
    if (database !== 'none') {
      module.registerDatabase('database', { isConnected: () => this.#isDatabaseUp })
    }
    if (database === 'fails') this.#failLater()
    if (warmUp !== 'none') module.registerWarmup('/', this.#warmUpOf(warmUp))
    return module
  }

  #failLater(): void {
    const fail = (): void => {
      this.#isDatabaseUp = false
    }
    const recover = (): void => {
      this.#isDatabaseUp = true
    }
    setTimeout(fail, 500).unref()
    setTimeout(recover, 1_200).unref()
  }

  #warmUpOf(kind: Life['warmUp']): () => Promise<void> {
    let isFirst = true
    return async () => {
      const fails = kind === 'fails once' && isFirst
      isFirst = false
      if (kind === 'slow') await pause(700, undefined, { ref: false })
      if (fails) throw new Error('nothing is warm yet')
    }
  }

  #startWith(monitor: Monitor | undefined): void {
    if (!monitor) return
    const { monitorPort } = this.#setup
    const [server] = this.servers
    const isElsewhere = ['unix', 'fd', 'shared fd'].includes(this.life.server)
    const listen = isElsewhere ? { listen: { host: HOST, port: monitorPort } } : {}
    const instance = this.life.server === 'two' ? this.servers : server
    if (!instance) return
    const options = { server: instance, healthPath: HEALTH_PATH, ...listen }
    monitor.start(options).catch((error: unknown) => report('failed', String(error)))
    report('started')
    if (!this.life.isOff) setInterval(() => void this.#askItself(monitor), 150).unref()
  }

  async #askItself(monitor: Monitor): Promise<void> {
    await nextTurn() // where a signal has come, it is heard before this
    const askedAtMs = Date.now()
    const { healthy } = await monitor.health()
    report('verdict', 'health()', { isGreen: healthy, askedAtMs })
    const status = await monitor.status()
    report('verdict', 'status()', { isGreen: status.healthy, askedAtMs })
  }

  #shutDownWith(monitor: Monitor): void {
    const { cleanUp, handled } = this.life
    const limits = { timeoutMs: TIMEOUT_MS, exitAfterMs: EXIT_AFTER_MS, signals: handled }
    if (cleanUp === 'none') monitor.shutdownOnSignal(limits)
    else monitor.shutdownOnSignal({ ...limits, cleanUp: () => this.#cleanUp() })
  }

  async #cleanUp(): Promise<void> {
    report('cleanUp begin')
    this.#hasCleanedUp = true
    for (const socket of this.#upgraded) socket.end(GOODBYE)
    const { cleanUp } = this.life
    if (cleanUp === 'slow') await pause(700, undefined, { ref: false })
    if (cleanUp === 'throws') throw new Error('cannot clean up')
    if (cleanUp === 'endless') await new Promise(doNothing)
    report('cleanUp end')
  }

  // Its own listener of signals

  #listenForSignals(): void {
    const { listener, signal: first, isListenerOnce } = this.life
    if (listener === 'none') return
    const names = new Set<NodeJS.Signals>(['SIGTERM', 'SIGINT', first])
    const hear = (signal: NodeJS.Signals): void => {
      this.#onSignal(signal, hear).catch((error: unknown) => {
        report('failed', String(error))
        process.exitCode = 1
      })
    }
    for (const name of names) {
      if (isListenerOnce) process.once(name, hear)
      else process.on(name, hear)
    }
    report('listens for signals')
  }

  async #onSignal(signal: NodeJS.Signals, hear: (signal: NodeJS.Signals) => void): Promise<void> {
    const { listener } = this.life
    if (listener === 'signal-exit' && process.listeners(signal).some((each) => each !== hear)) {
      return // somebody else decides
    }
    report('listener begin', signal)
    if (listener === 'raises again' || listener === 'signal-exit') {
      report('listener end', signal)
      process.off(signal, hear)
      process.kill(process.pid, signal)
      return
    }
    if (listener === 'flushes') {
      await pause(1_500)
      report('listener end', signal)
      process.exit(OWN_STATUS)
    }
    const areListening = this.servers.every(({ listening }) => listening)
    if (listener === 'exits unless listening' && !areListening) process.exit(1)
    await this.#closeServers(listener)
    await this.#end(signal)
  }

  async #closeServers(kind: ListenerKind): Promise<void> {
    if (kind === 'bound close') {
      await Promise.all(this.#boundCloses.map((close) => close()))
      return
    }
    const close = CLOSERS[kind] ?? closeByCallback
    await Promise.all(this.servers.map((server) => close(server)))
  }

  async #end(signal: string): Promise<void> {
    this.#hasCleanedUp = true
    const { afterwards, ownCleanUpMs } = this.life
    if (ownCleanUpMs > 0) await pause(ownCleanUpMs)
    report('listener end', signal)
    if (afterwards === 'ends') return
    process.exitCode = OWN_STATUS
    if (afterwards === 'exits') process.exit()
  }
}

const GOODBYE = 'goodbye\n'

const closeByCallback = (server: net.Server): Promise<void> => {
  return new Promise((closed, failed) => {
    server.close((error) => (error ? failed(error) : closed()))
  })
}

/** The ways in which programs close a server, for those that do not say it in the usual way. */
const CLOSERS: Partial<Record<ListenerKind, (server: net.Server) => Promise<unknown>>> = {
  'close and once': async (server) => {
    server.close()
    await once(server, 'close')
  },
  'close event': async (server) => {
    await new Promise<void>((closed) => {
      server.on('close', closed)
      server.close()
    })
  },
  'prototype close': async (server) => {
    await new Promise<void>((closed) => {
      net.Server.prototype.close.call(server, () => closed())
    })
  },
  'async dispose': (server) => server[Symbol.asyncDispose]()
}

function doNothing(): void {}

// --- Requests and their answers ------------------------------------------------------------------

// What may become of a request. The program tells which ones it `got`; the client, what it read.

type RequestKind =
  'fast' | 'slow' | 'streamed' | 'large' | 'huge' | 'upload' | 'early' | 'endless' | 'upgrade'

const SLOW_MS = 600
const STREAM_PARTS = 5
const STREAM_PAUSE_MS = 100
const UPLOAD_PARTS = 4
const UPLOAD_PART = 'u'.repeat(10_000)
const UPLOAD_PAUSE_MS = 120
const READER_PAUSE_MS = 1_500 // longer than a goodbye may take
const SIZES: Partial<Record<RequestKind, number>> = {
  streamed: 500,
  large: 600_000,
  huge: 4_000_000
}
const USUAL_KINDS: RequestKind[] = [
  ...Array<RequestKind>(10).fill('fast'),
  'slow',
  'streamed',
  'large'
]

/** What a request is answered: its id stands at both ends. */
function bodyOf(kind: RequestKind, id: string): string {
  return `${id}:${kind}:${'x'.repeat(SIZES[kind] ?? 0)}:${id}`
}

/** A request is *accepted* when
 *  - it is the first one of a connection that was established, of TLS by TCP: nobody but the
 *    instance can have taken that, and it knew that it would close; or
 *  - the program got it, or a byte of its answer came. A later request by the same connection may
 *    cross the goodbye of a server that ends an idle connection, as HTTP allows; so may a stream
 *    that an HTTP/2 server refuses. Clients try these again.
 *  One that was accepted is *lost* unless its whole answer came, as it should be, and once. What is
 *  answered for ever cannot be lost, nor what its client gave up. */
interface Sent {
  id: string
  kind: RequestKind
  client: ClientKind
  /** Whether it is the first one of its connection. */
  isFirst: boolean
  sentAtMs: number
  /** `pending` is left where the client has given up. */
  state: 'pending' | 'refused' | 'answered' | 'broken' | 'wrong' | 'twice'
  bytes: number
  endedAtMs: number
  why: string
}

/** Where a client sends its requests, and until when. */
class Traffic {
  readonly sent: Sent[] = []
  readonly echoes: Echoes[] = []
  readonly setup: Setup
  /** Infinity before the signal. */
  signalledAtMs = Infinity
  /** Whether the instance has ended. */
  isOver = false
  /** Whether what is still open is closed by the trial. */
  hasGivenUp = false
  readonly #sockets = new Set<{ destroy(): void }>()

  constructor(setup: Setup) {
    this.setup = setup
  }

  mayAsk({ stopsMs }: Client): boolean {
    return !this.isOver && Date.now() < this.signalledAtMs + stopsMs
  }

  add(client: Client, kind: RequestKind, isFirst: boolean): Sent {
    const id = `r${this.sent.length}`
    const request: Sent = {
      id,
      kind,
      client: client.kind,
      isFirst,
      sentAtMs: Date.now(),
      state: 'pending',
      bytes: 0,
      endedAtMs: 0,
      why: ''
    }
    this.sent.push(request)
    return request
  }

  /** Until the trial is over. */
  keep(socket: { destroy(): void }): void {
    this.#sockets.add(socket)
  }

  forget(socket: { destroy(): void }): void {
    this.#sockets.delete(socket)
  }

  giveUp(): void {
    this.hasGivenUp = true
    for (const socket of this.#sockets) socket.destroy()
  }

  /** A connection of TCP, or of a Unix socket. */
  connect(isOfSecond: boolean): net.Socket {
    const { life, port, secondPort, socketPath } = this.setup
    if (life.server === 'unix') return net.connect({ path: socketPath })
    return net.connect({ host: HOST, port: isOfSecond ? secondPort : port })
  }
}

function settle(request: Sent, state: Sent['state'], why = ''): void {
  if (request.state !== 'pending') return
  request.state = state
  request.why = why
  request.endedAtMs = Date.now()
}

function isRefusal(error: unknown): boolean {
  const { code } = error as NodeJS.ErrnoException
  return code === 'ECONNREFUSED' || code === 'ENOENT'
}

// --- Clients of HTTP/1 ---------------------------------------------------------------------------

// By hand, since what an agent of Node.js tries again, or reads at its own pace, tells us nothing.

/** An answer as it was read. */
interface Answer {
  status: number
  body: string
  isLast: boolean
}

/** Takes answers out of what has come. */
class AnswerReader {
  #received: Buffer = Buffer.alloc(0)

  get bytes(): number {
    return this.#received.length
  }

  add(chunk: Buffer): void {
    this.#received = Buffer.concat([this.#received, chunk])
  }

  /** What is behind an upgrade belongs to another protocol. */
  takeRest(): Buffer {
    const rest = this.#received
    this.#received = Buffer.alloc(0)
    return rest
  }

  take(): Answer | undefined {
    const headEnd = this.#received.indexOf('\r\n\r\n')
    if (headEnd < 0) return undefined
    const head = this.#received.toString('latin1', 0, headEnd)
    const bodyStart = headEnd + 4
    const status = Number(head.slice(9, 12))
    const isLast = /\r\nconnection: *close/i.test(head)
    const [, length = '0'] = /\r\ncontent-length: *(\d+)/i.exec(head) ?? []
    if (/\r\ntransfer-encoding: *chunked/i.test(head)) {
      const chunked = this.#takeChunks(bodyStart)
      return chunked === undefined ? undefined : { status, body: chunked, isLast }
    }
    const bodyEnd = bodyStart + Number(length)
    if (this.#received.length < bodyEnd) return undefined
    const body = this.#received.toString('latin1', bodyStart, bodyEnd)
    this.#received = this.#received.subarray(bodyEnd)
    return { status, body, isLast }
  }

  #takeChunks(bodyStart: number): string | undefined {
    let body = ''
    let start = bodyStart
    for (;;) {
      const lineEnd = this.#received.indexOf('\r\n', start)
      if (lineEnd < 0) return undefined
      const size = Number.parseInt(this.#received.toString('latin1', start, lineEnd), 16)
      const end = lineEnd + 2 + size
      if (this.#received.length < end + 2) return undefined
      body += this.#received.toString('latin1', lineEnd + 2, end)
      start = end + 2
      if (size > 0) continue
      this.#received = this.#received.subarray(start)
      return body
    }
  }
}

/** One connection, and the requests that wait for their answers there. */
class Http1Connection {
  isFirst = true
  isOpen = false
  readonly #traffic: Traffic
  readonly #tcp: net.Socket
  readonly #socket: net.Socket
  readonly #reader = new AnswerReader()
  readonly #waiting: Sent[] = []
  #last: Sent | undefined
  #hasConnected = false
  #failure = 'closed'
  #onSettled: () => void = doNothing
  onUpgraded: ((socket: net.Socket, rest: Buffer) => void) | undefined

  constructor(traffic: Traffic, isOfSecond: boolean) {
    this.#traffic = traffic
    this.#tcp = traffic.connect(isOfSecond)
    const isSecure = ['https', 'h2'].includes(traffic.setup.life.server)
    const secrets = { socket: this.#tcp, rejectUnauthorized: false, ALPNProtocols: ['http/1.1'] }
    this.#socket = isSecure ? tls.connect(secrets) : this.#tcp
    traffic.keep(this.#socket)
    this.#tcp.on('connect', () => {
      this.#hasConnected = true
      this.isOpen = true
    })
    this.#tcp.on('error', (error) => this.#onError(error))
    if (isSecure) this.#socket.on('error', (error) => this.#onError(error))
    this.#socket.on('data', (chunk: Buffer) => this.#onData(chunk))
    this.#socket.on('end', () => this.#onEnd())
    this.#socket.on('close', () => this.#onClose())
  }

  /** Resolves when each of the requests has its answer, or will never have it. */
  async ask(requests: Sent[], send: (socket: net.Socket) => unknown): Promise<void> {
    this.#waiting.push(...requests)
    this.isFirst = false
    const settled = new Promise<void>((done) => {
      this.#onSettled = done
    })
    if (this.#socket.destroyed) this.#onClose()
    else await send(this.#socket)
    await settled
  }

  close(): void {
    this.isOpen = false
    this.#traffic.forget(this.#socket)
    this.#socket.end()
    setTimeout(() => this.#socket.destroy(), CLIENT_GRACE_MS).unref()
  }

  #onError(error: Error): void {
    const { code = error.message } = error as NodeJS.ErrnoException
    this.#failure = code
    if (this.#hasConnected || !isRefusal(error)) return
    for (const request of this.#waiting) settle(request, 'refused', code)
  }

  #onEnd(): void {
    if (this.isOpen) this.#failure = 'ended'
    this.isOpen = false
    this.#socket.end()
  }

  #onClose(): void {
    this.isOpen = false
    this.#traffic.forget(this.#socket)
    const state = this.#traffic.hasGivenUp && this.#reader.bytes === 0 ? 'pending' : 'broken'
    for (const request of this.#waiting.splice(0)) {
      settle(request, this.#hasConnected ? state : 'refused', this.#failure)
    }
    this.#onSettled()
  }

  #onData(chunk: Buffer): void {
    const [current] = this.#waiting
    if (!current && this.#last) {
      this.#last.state = 'twice'
      return
    }
    if (current) current.bytes += chunk.length
    if (current?.kind === 'endless') return
    this.#reader.add(chunk)
    for (;;) {
      const answer = this.#reader.take()
      if (!answer) return
      this.#onAnswer(answer)
    }
  }

  #onAnswer(answer: Answer): void {
    const request = this.#waiting.shift()
    if (answer.isLast) {
      this.isOpen = false
      this.#failure = 'dropped behind Connection: close'
    }
    if (!request) {
      if (this.#last) this.#last.state = 'twice'
      return
    }
    this.#last = request
    const next = this.#waiting[0]
    if (next) next.bytes += this.#reader.bytes
    if (answer.status === 101) this.#becomeUpgraded(request)
    else checkAnswer(request, answer.status, answer.body)
    if (this.#waiting.length === 0) this.#onSettled()
  }

  #becomeUpgraded(request: Sent): void {
    settle(request, 'answered')
    this.#socket.removeAllListeners('data')
    this.onUpgraded?.(this.#socket, this.#reader.takeRest())
  }
}

function checkAnswer(request: Sent, status: number, body: string): void {
  const isRight = status === 200 && body === bodyOf(request.kind, request.id)
  if (isRight) settle(request, 'answered')
  else settle(request, 'wrong', `${status} ${body.slice(0, 60)}`)
}

function headOf({ id, kind }: Sent, more = ''): string {
  const method = more.includes('Content-Length') ? 'POST' : 'GET'
  return `${method} /${kind}/${id} HTTP/1.1\r\nHost: localhost\r\n${more}\r\n`
}

/** Sends requests until the life says that it stops, or nobody takes its connections. */
async function askByHttp1(traffic: Traffic, client: Client, chance: Chance): Promise<void> {
  let connection: Http1Connection | undefined
  while (traffic.mayAsk(client)) {
    if (!connection?.isOpen || client.kind === 'fresh') {
      connection?.close()
      connection = new Http1Connection(traffic, client.isOfSecond)
    }
    const requests = await askOnce(traffic, client, connection, chance)
    if (requests.some(({ state }) => state === 'refused')) break
    await pause(Math.max(client.pauseMs, 5))
  }
  connection?.close()
}

async function askOnce(
  traffic: Traffic,
  client: Client,
  connection: Http1Connection,
  chance: Chance
): Promise<Sent[]> {
  const { kind } = client
  if (kind === 'pipelined') return askThree(traffic, client, connection, chance)

  const requestKind = KINDS_OF_CLIENTS[kind] ?? chance.oneOf(USUAL_KINDS)
  const request = traffic.add(client, requestKind, connection.isFirst)
  const head = headOf(request)
  await connection.ask([request], (socket) => {
    if (kind === 'slow reader') return readSlowly(socket, head)
    if (kind === 'upload' || kind === 'early') return upload(socket, request)
    if (kind === 'endless') giveUpLater(traffic, socket)
    return socket.write(head)
  })
  return [request]
}

/** Those that send but one kind of request. */
const KINDS_OF_CLIENTS: Partial<Record<ClientKind, RequestKind>> = {
  'slow reader': 'huge',
  upload: 'upload',
  early: 'early',
  endless: 'endless'
}

/** At once, by one connection. */
async function askThree(
  traffic: Traffic,
  client: Client,
  connection: Http1Connection,
  chance: Chance
): Promise<Sent[]> {
  const { isFirst } = connection
  const kinds = [chance.oneOf(USUAL_KINDS), chance.oneOf(USUAL_KINDS), 'fast' as const]
  const requests = kinds.map((kind, index) => traffic.add(client, kind, isFirst && index === 0))
  const text = requests.map((request) => headOf(request)).join('')
  await connection.ask(requests, (socket) => socket.write(text))
  return requests
}

async function readSlowly(socket: net.Socket, text: string): Promise<void> {
  socket.write(text)
  socket.pause()
  await pause(READER_PAUSE_MS)
  socket.resume()
}

async function upload(socket: net.Socket, request: Sent): Promise<void> {
  const length = UPLOAD_PARTS * UPLOAD_PART.length
  socket.write(headOf(request, `Content-Length: ${length}\r\n`))
  for (let part = 0; part < UPLOAD_PARTS; part++) {
    await pause(UPLOAD_PAUSE_MS)
    if (socket.writable) socket.write(UPLOAD_PART)
  }
}

/** Nobody waits for ever, and a program that closes its server waits for whoever does. */
function giveUpLater(traffic: Traffic, socket: net.Socket): void {
  const timer = setInterval(() => {
    if (Date.now() < traffic.signalledAtMs + PATIENCE_MS) return
    socket.destroy()
  }, 100)
  socket.on('close', () => clearInterval(timer))
}

// --- Clients of HTTP/2 ---------------------------------------------------------------------------

/** A session, and the connection below it, which tells whether it was accepted. */
class Http2Session {
  readonly session: http2.ClientHttp2Session
  hasConnected = false

  constructor(traffic: Traffic) {
    const tcp = traffic.connect(false)
    tcp.on('connect', () => {
      this.hasConnected = true
    })
    tcp.on('error', doNothing)
    const secrets = { socket: tcp, rejectUnauthorized: false, ALPNProtocols: ['h2'] }
    const isSecure = traffic.setup.life.server === 'h2'
    const authority = isSecure ? 'https://localhost' : 'http://localhost'
    this.session = http2.connect(authority, {
      createConnection: () => (isSecure ? tls.connect(secrets) : tcp)
    })
    this.session.on('error', doNothing)
  }

  get isOpen(): boolean {
    return !this.session.closed && !this.session.destroyed
  }

  close(): void {
    this.session.close()
    setTimeout(() => this.session.destroy(), CLIENT_GRACE_MS).unref()
  }
}

/** Several streams at the same time by one session; a new one when it has gone away. */
async function askByHttp2(traffic: Traffic, client: Client, chance: Chance): Promise<void> {
  while (traffic.mayAsk(client)) {
    const peer = new Http2Session(traffic)
    traffic.keep(peer.session)
    const asked: Promise<void>[] = []
    while (traffic.mayAsk(client) && peer.isOpen) {
      const request = traffic.add(client, chance.oneOf(USUAL_KINDS), asked.length === 0)
      const done = askByStream(peer, request)
      asked.push(done)
      await Promise.race([done, pause(client.pauseMs + 30)])
      await pause(5)
    }
    await Promise.all(asked)
    traffic.forget(peer.session)
    peer.close()
    if (!peer.hasConnected) return
  }
}

async function askByStream(peer: Http2Session, request: Sent): Promise<void> {
  let stream: http2.ClientHttp2Stream
  try {
    stream = peer.session.request({ ':path': `/${request.kind}/${request.id}` })
  } catch (error) {
    settle(request, 'refused', String(error)) // it was never sent
    return
  }
  let body = ''
  let status = 0
  let failure: NodeJS.ErrnoException | undefined
  stream.on('response', (headers) => {
    status = Number(headers[':status'])
    request.bytes++
  })
  stream.on('data', (chunk: Buffer) => {
    body += chunk.toString('latin1')
    request.bytes += chunk.length
  })
  if (request.kind === 'large') {
    stream.pause() // others go on meanwhile
    setTimeout(() => stream.resume(), READER_PAUSE_MS)
  }
  stream.on('error', (error) => {
    failure = error
  })
  let hasEnded = false
  stream.on('end', () => {
    hasEnded = true
  })
  await new Promise<void>((closed) => {
    stream.on('close', closed)
  })
  const isRefusedStream = stream.rstCode === http2.constants.NGHTTP2_REFUSED_STREAM
  if (isRefusedStream || !peer.hasConnected) settle(request, 'refused', failure?.code)
  else if (hasEnded && status > 0 && !failure) checkAnswer(request, status, body)
  else settle(request, 'broken', failure?.code ?? `reset with ${stream.rstCode}`)
}

// --- Upgraded connections ------------------------------------------------------------------------

/** What came back of what was sent. */
interface Echoes {
  id: string
  sent: { text: string; atMs: number }[]
  received: string
  endedAtMs: number
  hasGoodbye: boolean
}

async function askUpgraded(traffic: Traffic, client: Client): Promise<void> {
  while (traffic.mayAsk(client)) {
    const connection = new Http1Connection(traffic, client.isOfSecond)
    const request = traffic.add(client, 'upgrade', true)
    let goingOn: Promise<void> | undefined
    connection.onUpgraded = (socket, rest) => {
      goingOn = echo(traffic, request.id, socket, rest)
    }
    const head = headOf(request, 'Connection: Upgrade\r\nUpgrade: echo\r\n')
    await connection.ask([request], (socket) => socket.write(head))
    await goingOn
    connection.close()
    if (request.state === 'refused') return
    await pause(Math.max(client.pauseMs, 30))
  }
}

/** Says a line now and then, until the peer ends the connection. */
async function echo(traffic: Traffic, id: string, socket: net.Socket, rest: Buffer): Promise<void> {
  const echoes: Echoes = { id, sent: [], received: '', endedAtMs: 0, hasGoodbye: false }
  traffic.echoes.push(echoes)
  echoes.received += rest.toString('latin1')
  socket.on('data', (chunk: Buffer) => {
    echoes.received += chunk.toString('latin1')
  })
  const timer = setInterval(() => {
    if (!socket.writable) return
    const text = `${id}.${echoes.sent.length}\n`
    echoes.sent.push({ text, atMs: Date.now() })
    socket.write(text)
  }, 150)
  giveUpLater(traffic, socket)
  if (!socket.destroyed) await new Promise<void>((closed) => socket.on('close', () => closed()))
  clearInterval(timer)
  echoes.endedAtMs = Date.now()
  echoes.hasGoodbye = echoes.received.includes(GOODBYE)
}

// --- Probers -------------------------------------------------------------------------------------

/** A question, in one of the ways to ask, and its answer. */
interface Verdict {
  way: string
  askedAtMs: number
  answeredAtMs: number
  isGreen: boolean
}

type Way = 'line' | 'http' | 'agent' | 'status' | 'path'

const WAYS: Record<ProberKind, Way[]> = {
  none: [],
  all: ['line', 'http', 'agent', 'status', 'path'],
  line: ['line'],
  http: ['http'],
  agent: ['agent'],
  path: ['path'],
  vanishes: ['line', 'path']
}

/** Asks until the instance is over; whatever does not answer has told nothing. */
async function probe(traffic: Traffic, verdicts: Verdict[]): Promise<void> {
  const { life } = traffic.setup
  const ways = life.isOff ? [] : WAYS[life.prober]
  while (ways.length > 0 && !traffic.isOver) {
    if (life.prober === 'vanishes' && traffic.signalledAtMs < Infinity) return
    const round = await Promise.all(ways.map((way) => askVerdict(traffic, way)))
    verdicts.push(...round.filter((verdict) => verdict !== undefined))
    await pause(life.proberPauseMs)
  }
}

async function askVerdict(traffic: Traffic, way: Way): Promise<Verdict | undefined> {
  const { life, monitorPort } = traffic.setup
  const askedAtMs = Date.now()
  let isGreen: boolean | undefined
  if (way === 'path') {
    if (life.server === 'h2c') isGreen = await askPathByHttp2(traffic)
    else isGreen = isOk(await exchange(connectSafely(traffic), requestOf(HEALTH_PATH)))
  } else {
    const socket = net.connect({ host: HOST, port: monitorPort })
    const answer = await exchange(socket, QUESTIONS[way])
    if (way === 'line' && answer !== '') isGreen = answer === 'OK\n'
    else if (way === 'agent' && answer !== '') isGreen = answer.startsWith('up')
    else isGreen = isOk(answer)
  }
  if (isGreen === undefined) return undefined
  return { way, askedAtMs, answeredAtMs: Date.now(), isGreen }
}

function requestOf(path: string): string {
  return `GET ${path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n`
}

const QUESTIONS: Record<Exclude<Way, 'path'>, string> = {
  line: 'health_check\n',
  agent: 'agent_check\n',
  http: requestOf('/health_check'),
  status: requestOf('/status')
}

/** `undefined` where that was no answer, or not of the monitor. */
function isOk(answer: string): boolean | undefined {
  const [, status = ''] = /^HTTP\/1\.1 (\d+)/.exec(answer) ?? []
  if (status === '200') return !answer.endsWith('front page')
  return status === '503' ? false : undefined
}

function connectSafely(traffic: Traffic): net.Socket {
  const tcp = traffic.connect(false)
  if (!['https', 'h2'].includes(traffic.setup.life.server)) return tcp
  tcp.on('error', doNothing)
  return tls.connect({ socket: tcp, rejectUnauthorized: false, ALPNProtocols: ['http/1.1'] })
}

/** What a peer answers until it ends the connection, '' where it breaks. */
async function exchange(socket: net.Socket, question: string): Promise<string> {
  let answer = ''
  let isBroken = false
  socket.on('error', () => {
    isBroken = true
  })
  socket.on('data', (chunk: Buffer) => {
    answer += chunk.toString('latin1')
  })
  socket.setTimeout(2_000, () => socket.destroy())
  socket.write(question)
  await new Promise<void>((closed) => socket.on('close', () => closed()))
  return isBroken ? '' : answer
}

async function askPathByHttp2(traffic: Traffic): Promise<boolean | undefined> {
  const { session } = new Http2Session(traffic)
  session.setTimeout(2_000, () => session.destroy())
  const stream = session.request({ ':path': HEALTH_PATH })
  let status = 0
  stream.on('response', (headers) => {
    status = Number(headers[':status'])
  })
  stream.on('error', doNothing)
  stream.resume()
  await new Promise<void>((closed) => {
    stream.on('close', closed)
  })
  session.close()
  if (status === 200) return true
  return status === 503 ? false : undefined
}

// --- Living it -----------------------------------------------------------------------------------

/** What became of a life. */
interface Outcome {
  events: ProgramEvent[]
  sent: Sent[]
  echoes: Echoes[]
  verdicts: Verdict[]
  /** Infinity where the program was over before. */
  signalledAtMs: number
  secondAtMs: number
  endedAtMs: number
  status: number | null
  signal: NodeJS.Signals | null
  /** By the trial, since it would not end. */
  isKilled: boolean
  leftBehind: string[]
  log: string
}

/** What all lives of a run have in common. */
interface Run {
  folder: string
  keyFile: string
  certFile: string
  monitor: string
  runtime: string
  isShown: boolean
}

/** What runs, so that it ends with the trial, however that ends. */
const children = new Set<ChildProcess>()

function keepUntilExit(child: ChildProcess): void {
  children.add(child)
  child.on('exit', () => children.delete(child))
}

function endChildren(): void {
  for (const child of children) child.kill('SIGKILL')
}

const givenPorts = new Set<number>()

/** A port whose followers, +1 and +80, are free, too, and which no other life has. */
async function freePort(): Promise<number> {
  for (;;) {
    const port = FIRST_PORT + 2 * Math.floor(Math.random() * 4_900)
    const ports = [port, port + 1, port + 80]
    if (ports.some((each) => givenPorts.has(each))) continue
    for (const each of ports) givenPorts.add(each)
    const areFree = await Promise.all(ports.map((each) => isFree(each)))
    if (areFree.every(Boolean)) return port
  }
}

async function isFree(port: number): Promise<boolean> {
  const server = net.createServer().listen(port, HOST)
  try {
    await once(server, 'listening')
  } catch {
    return false
  }
  server.close()
  await once(server, 'close')
  return true
}

class Living {
  readonly #run: Run
  readonly #life: Life
  readonly #setup: Setup
  readonly #traffic: Traffic
  readonly #logFile: string
  readonly #verdicts: Verdict[] = []
  /** It holds the shared socket. */
  #holder: ChildProcess | undefined
  #secondAtMs = Infinity
  #isKilled = false

  constructor(run: Run, life: Life, isWithUs: boolean, port: number) {
    const { keyFile, certFile, monitor } = run
    const name = `${life.name.replace(':', '-')}-${isWithUs ? 'with' : 'without'}`
    this.#run = run
    this.#life = life
    this.#logFile = join(run.folder, `${name}.log`)
    this.#setup = {
      life,
      isWithUs,
      monitor,
      port,
      secondPort: port + 1,
      monitorPort: port + 80,
      socketPath: join(run.folder, `${name}.sock`),
      keyFile,
      certFile
    }
    this.#traffic = new Traffic(this.#setup)
  }

  async live(): Promise<Outcome> {
    const child = await this.#spawn()
    const ended = once(child, 'exit') as Promise<[number | null, NodeJS.Signals | null]>
    const hasListened = await Promise.race([this.#untilListening(), ended.then(() => false)])
    const clients: Promise<unknown>[] = []
    if (hasListened) {
      clients.push(...this.#life.clients.map((client, index) => this.#ask(client, index)))
      clients.push(probe(this.#traffic, this.#verdicts))
    }
    const signalled = this.#sendSignals(child)
    const [status, signal] = await ended
    const endedAtMs = Date.now()
    child.emit('over')
    this.#traffic.isOver = true
    await signalled
    const allDone = Promise.all(clients)
    await Promise.race([allDone, pause(LAST_READ_MS, undefined, { ref: false })])
    this.#traffic.giveUp()
    await allDone
    await this.#endHolder()
    return {
      events: this.#events(),
      sent: this.#traffic.sent,
      echoes: this.#traffic.echoes,
      verdicts: this.#verdicts,
      signalledAtMs: this.#traffic.signalledAtMs,
      secondAtMs: this.#secondAtMs,
      endedAtMs,
      status,
      signal,
      isKilled: this.#isKilled,
      leftBehind: await this.#leftBehind(),
      log: this.#logFile
    }
  }

  async #spawn(): Promise<ChildProcess> {
    const { port, isWithUs } = this.#setup
    const { server, way } = this.#life
    const isAuto = isWithUs && way === 'auto'
    const env = this.#environment(isAuto)
    const log = openSync(this.#logFile, 'a')
    const isInherited = server === 'fd' || server === 'shared fd'
    const listener = isInherited ? await listenFor(port) : undefined
    // Node.js passes on the handle of a server, though its types know of none.
    const { _handle: handle } = Object(listener) as { _handle?: unknown }
    const stdio = ['ignore', log, log, ...(listener ? [handle] : [])]
    const words = this.#command(isAuto)
    const child = spawn(this.#run.runtime, words, { env, stdio: stdio as 'ignore'[] })
    keepUntilExit(child)
    if (server === 'shared fd') {
      const held = ['ignore', 'ignore', 'ignore', handle] as 'ignore'[]
      this.#holder = spawn('sleep', ['60'], { stdio: held })
      keepUntilExit(this.#holder)
    }
    listener?.close()
    closeSync(log)
    return child
  }

  #environment(isAuto: boolean): NodeJS.ProcessEnv {
    const { port, monitorPort } = this.#setup
    const { server, isOff } = this.#life
    const env: NodeJS.ProcessEnv = { ...process.env, LIFE: JSON.stringify(this.#setup) }
    delete env['NODE_OPTIONS']
    for (const name of Object.keys(env)) {
      if (name.startsWith('FTW_MONITOR') || name === 'PORT') delete env[name]
    }
    if (isOff) env['FTW_MONITOR'] = '0'
    if (!isAuto) return env
    env['FTW_MONITOR'] = 'auto'
    env['FTW_MONITOR_TIMEOUT_MS'] = String(TIMEOUT_MS)
    env['FTW_MONITOR_HEALTH_PATH'] = HEALTH_PATH
    if (server === 'unix') env['FTW_MONITOR_LISTEN'] = `${HOST}:${monitorPort}`
    else env['PORT'] = String(port)
    return env
  }

  async #endHolder(): Promise<void> {
    if (!this.#holder) return
    this.#holder.kill('SIGKILL')
    await once(this.#holder, 'exit')
  }

  #command(isAuto: boolean): string[] {
    const script = fileURLToPath(import.meta.url)
    const { monitor, runtime } = this.#run
    const words = [script, PROGRAM]
    switch (runtimeName(runtime)) {
      case 'bun':
        return isAuto ? ['--preload', monitor, ...words] : words
      case 'deno':
        return ['run', '-A', ...(isAuto ? ['--preload', monitor] : []), ...words]
      case 'node':
        return isAuto ? ['--import', pathToFileURL(monitor).href, ...words] : words
    }
  }

  #events(): ProgramEvent[] {
    const lines = readFileSync(this.#logFile, 'latin1').split('\n')
    const marked = lines.filter((line) => line.startsWith(MARK) && line.endsWith('}'))
    return marked.map((line) => JSON.parse(line.slice(MARK.length)) as ProgramEvent)
  }

  #has(kind: EventKind): boolean {
    return this.#events().some((event) => event.kind === kind)
  }

  async #untilListening(): Promise<boolean> {
    const sinceMs = performance.now()
    while (performance.now() - sinceMs < BOOT_MS) {
      if (this.#has('listening')) return true
      await pause(15)
    }
    return false
  }

  async #ask(client: Client, index: number): Promise<void> {
    await pause(client.startsMs)
    const chance = new Chance(`${this.#life.name}/${index}`)
    if (client.kind === 'sessions') await askByHttp2(this.#traffic, client, chance)
    else if (client.kind === 'upgraded') await askUpgraded(this.#traffic, client)
    else await askByHttp1(this.#traffic, client, chance)
  }

  /** Sends what the program does not raise itself, and ends what would never end. Without us it has
   *  one signal alone: a second one is the same stop to us. */
  async #sendSignals(child: ChildProcess): Promise<void> {
    const { moment, signal, signalAtMs, second, secondAfterMs } = this.#life
    const over = once(child, 'over').then(() => 'over')
    const wait = async (ms: number): Promise<boolean> => {
      return (await Promise.race([over, pause(ms, undefined, { ref: false })])) !== 'over'
    }
    if (moment === 'serving') {
      if (!(await wait(signalAtMs))) return
      child.kill(signal)
    }
    const raised = this.#events().find(({ kind }) => kind === 'raised')
    this.#traffic.signalledAtMs = raised?.atMs ?? Date.now()
    const limitMs = this.#limitMs()
    if (second !== 'none' && this.#setup.isWithUs) {
      if (!(await wait(secondAfterMs))) return
      this.#secondAtMs = Date.now()
      child.kill(second)
    }
    const elapsedMs = Date.now() - this.#traffic.signalledAtMs
    if (!(await wait(limitMs - elapsedMs))) return
    this.#isKilled = true
    child.kill('SIGKILL')
  }

  #limitMs(): number {
    const { isWithUs } = this.#setup
    if (!isWithUs) return UNCOMPARED_MS
    return EXIT_AFTER_MS + OTHERS_MS + SLACK_MS
  }

  async #leftBehind(): Promise<string[]> {
    const { port, secondPort, monitorPort, socketPath } = this.#setup
    const found: string[] = []
    if (existsSync(socketPath)) found.push('a socket file')
    rmSync(socketPath, { force: true })
    for (const each of [port, secondPort, monitorPort]) {
      if (!(await isFree(each))) found.push(`port ${each}`)
    }
    return found
  }
}

/** A socket that listens, to be inherited. */
async function listenFor(port: number): Promise<net.Server> {
  const server = net.createServer().listen(port, HOST)
  await once(server, 'listening')
  return server
}

function runtimeName(runtime: string): 'node' | 'bun' | 'deno' {
  const name = basename(runtime).replace('.exe', '')
  return name === 'bun' || name === 'deno' ? name : 'node'
}

// --- Judging it ----------------------------------------------------------------------------------

/** Compares the two; what is wrong, in words. */
class Judge {
  readonly faults: string[] = []
  readonly #life: Life
  readonly #withUs: Outcome
  readonly #without: Outcome

  constructor(life: Life, withUs: Outcome, without: Outcome) {
    this.#life = life
    this.#withUs = withUs
    this.#without = without
  }

  judge(): string[] {
    this.#judgeTrial()
    this.#judgeRequests()
    this.#judgeEchoes()
    this.#judgeVerdicts()
    this.#judgeCleanUp()
    this.#judgeEnd()
    this.#judgeRest()
    return this.faults
  }

  /** Whether the signal found ours in charge. In auto that is soon after the server listens. */
  get #isInCharge(): boolean {
    const { way, moment, startAt } = this.#life
    if (!isSignalOurs(this.#life) || moment === 'up' || moment === 'heard') return false
    if (way === 'auto') return moment === 'serving'
    if (startAt === 'before listen') return true
    const started = this.#first(this.#withUs, 'started')
    return started < this.#withUs.signalledAtMs
  }

  /** A person who insists ends it in the middle. */
  get #isInsisted(): boolean {
    const { second, secondAfterMs } = this.#life
    return second === 'SIGINT' && secondAfterMs >= 1_000 && this.#withUs.secondAtMs < Infinity
  }

  #first(outcome: Outcome, kind: EventKind): number {
    return outcome.events.find((event) => event.kind === kind)?.atMs ?? Infinity
  }

  #count(outcome: Outcome, kind: EventKind): number {
    return outcome.events.filter((event) => event.kind === kind).length
  }

  /** A life without an instance would try nothing. */
  #judgeTrial(): void {
    const { moment } = this.#life
    if (moment !== 'serving' && moment !== 'bound') return
    for (const outcome of [this.#withUs, this.#without]) {
      if (this.#count(outcome, 'listening') === 0) this.faults.push('the program never listened')
    }
  }

  // Requests

  #judgeRequests(): void {
    const lossesWithout = lossesOf(this.#without)
    const isOurs = this.#isInCharge
    const mayLose = this.#isInsisted || !(isOurs || this.#isSafeWithout)
    // Where the program closes its server by itself, what it has not read yet is lost by chance.
    const losses = lossesOf(this.#withUs).filter((loss) => isOurs || this.#isSeen(loss))
    if (losses.length > 0 && !mayLose) {
      const shown = losses.slice(0, 3).map((loss) => this.#describeLoss(loss))
      const count = `lost ${losses.length} of ${this.#withUs.sent.length} requests`
      this.faults.push(`${count} (${lossesWithout.length} without us): ${shown.join('; ')}`)
    }
    for (const { id, state } of this.#withUs.sent) {
      if (state === 'twice') this.faults.push(`${id} was answered twice`)
      const gets = this.#withUs.events.filter(({ kind, detail }) => kind === 'got' && detail === id)
      if (gets.length > 1) this.faults.push(`the program got ${id} ${gets.length} times`)
    }
  }

  /** The program itself finishes its requests when this signal comes. Where it comes past us, what
   *  is lost is so by chance, with us and without. */
  get #isSafeWithout(): boolean {
    const { signal, sent } = this.#without
    if (!isSignalOurs(this.#life) || signal !== null || sent.length === 0) return false
    return lossesOf(this.#without).length === 0
  }

  #isSeen({ id }: Sent): boolean {
    return this.#withUs.events.some(({ kind, detail }) => kind === 'got' && detail === id)
  }

  #describeLoss(loss: Sent): string {
    const { id, kind, client, state, why, endedAtMs, sentAtMs, bytes } = loss
    const { signalledAtMs } = this.#withUs
    const times = `sent ${sign(sentAtMs - signalledAtMs)}, over ${sign(endedAtMs - signalledAtMs)}`
    const seen = this.#isSeen(loss) ? 'got' : 'never read'
    return `${id} (${kind} by ${client}, ${times} ms, ${seen}, ${bytes} bytes): ${state} ${why}`
  }

  #judgeEchoes(): void {
    if (this.#isInsisted || !this.#isInCharge) return
    const { signalledAtMs, echoes } = this.#withUs
    const latestMs = signalledAtMs - this.#life.blockMs - CLIENT_GRACE_MS
    const cleanedUpAtMs = this.#first(this.#withUs, 'cleanUp begin')
    for (const { id, sent, received, hasGoodbye, endedAtMs } of echoes) {
      const missing = sent.filter(({ text, atMs }) => atMs < latestMs && !received.includes(text))
      if (missing.length > 0) this.faults.push(`${missing.length} echoes of ${id} are missing`)
      if (cleanedUpAtMs === Infinity) continue
      const wasEndedBefore = endedAtMs < cleanedUpAtMs - SIGNAL_GRACE_MS
      const when = `${cleanedUpAtMs - endedAtMs} ms before cleanUp`
      if (wasEndedBefore) this.faults.push(`the upgraded ${id} was cut ${when}`)
      else if (!hasGoodbye) this.faults.push(`the upgraded ${id} has no goodbye`)
    }
  }

  // The verdict

  get #verdicts(): Verdict[] {
    const own: Verdict[] = []
    for (const { kind, detail, atMs, askedAtMs = atMs, isGreen = false } of this.#withUs.events) {
      if (kind !== 'verdict') continue
      own.push({ way: detail, askedAtMs, answeredAtMs: atMs, isGreen })
    }
    return [...this.#withUs.verdicts, ...own].sort((a, b) => a.askedAtMs - b.askedAtMs)
  }

  /** From when on the program knows of the signal: what blocks it holds up both. */
  get #heardAtMs(): number {
    const heardAtMs = this.#withUs.signalledAtMs
    const blockedAtMs = this.#first(this.#withUs, 'blocked')
    const unblockedAtMs = this.#first(this.#withUs, 'unblocked')
    const isBlocked = heardAtMs > blockedAtMs - SIGNAL_GRACE_MS && heardAtMs < unblockedAtMs
    return (isBlocked ? unblockedAtMs : heardAtMs) + SIGNAL_GRACE_MS
  }

  #judgeVerdicts(): void {
    if (this.#isInCharge) {
      const greens = this.#verdicts.filter(
        ({ isGreen, askedAtMs }) => isGreen && askedAtMs > this.#heardAtMs
      )
      const [green] = greens
      if (green) {
        const afterMs = green.askedAtMs - this.#withUs.signalledAtMs
        const count = `${greens.length} green answers after the signal`
        this.faults.push(`${count}, the first by ${green.way} after ${afterMs} ms`)
      }
    }
    this.#judgeAgreement()
  }

  /** Two ways disagree where they say the opposite in turns, and each of them twice: what they are
   *  asked meanwhile may change once. */
  #judgeAgreement(): void {
    const ways = [...new Set(this.#verdicts.map(({ way }) => way))]
    for (const [index, way] of ways.entries()) {
      for (const other of ways.slice(index + 1)) {
        const fault = describeDisagreement(this.#verdicts, way, other)
        if (fault) this.faults.push(fault)
      }
    }
  }

  // Clean-ups

  #judgeCleanUp(): void {
    const { cleanUp } = this.#life
    const count = this.#count(this.#withUs, 'cleanUp begin')
    if (count > 1) this.faults.push(`cleanUp was called ${count} times`)
    const isWanted = cleanUp !== 'none' && this.#isInCharge && !this.#isInsisted
    if (isWanted && count === 0) this.faults.push('cleanUp was not called')
    if (this.#isInCharge) this.#judgeOrder('cleanUp begin')
    if (this.#isInCharge && !this.#isInsisted) this.#judgeOrder('listener begin')
    this.#judgeOwnCleanUps()
  }

  /** Whatever is to come after the last answer. */
  #judgeOrder(kind: EventKind): void {
    const atMs = this.#first(this.#withUs, kind)
    const { sent, events } = this.#withUs
    const endless = new Set(sent.filter((each) => each.kind === 'endless').map(({ id }) => id))
    const late = events.filter((event) => {
      const isOfRequest = event.kind === 'got' || event.kind === 'done'
      return isOfRequest && event.atMs > atMs && !endless.has(event.detail)
    })
    const [first] = late
    if (!first) return
    const times = `${first.detail} ${first.kind} ${first.atMs - atMs} ms later`
    this.faults.push(`${kind} came before the last answer: ${times}`)
  }

  /** Whatever ran without us. */
  #judgeOwnCleanUps(): void {
    if (this.#isInsisted || this.#life.cleanUp === 'endless') return
    if (this.#isSecondItsOwn) return
    for (const kind of ['listener begin', 'listener end', 'exit'] as const) {
      const ranWithout = this.#count(this.#without, kind) > 0
      const ranWithUs = this.#count(this.#withUs, kind) > 0
      if (ranWithout && !ranWithUs) this.faults.push(`no ${kind} of the program's own`)
    }
    const failures = this.#withUs.events.filter(({ kind }) => kind === 'failed')
    const failuresWithout = this.#count(this.#without, 'failed')
    const [failure] = failures
    if (failure && failures.length > failuresWithout) {
      this.faults.push(`the program failed: ${failure.detail}`)
    }
  }

  // The end

  #judgeEnd(): void {
    const { endedAtMs, signalledAtMs, isKilled } = this.#withUs
    const tookMs = endedAtMs - signalledAtMs
    const limitMs = this.#limitMs()
    if (isKilled && limitMs < Infinity) this.faults.push('it did not end')
    else if (tookMs > limitMs) this.faults.push(`it took ${tookMs} ms of ${limitMs}`)
    if (isKilled) return
    const found = describeEnd(this.#withUs)
    const expected = this.#expectedEnds()
    if (expected.length > 0 && !expected.includes(found)) {
      this.faults.push(`ended by ${found}, not by ${expected.join(' or ')}`)
    }
  }

  #limitMs(): number {
    const { isKilled, endedAtMs, signalledAtMs } = this.#without
    if (this.#life.way === 'code' && this.#isInCharge) {
      return EXIT_AFTER_MS + OTHERS_MS + SLACK_MS / 2
    }
    if (isKilled) return Infinity
    return endedAtMs - signalledAtMs + TIMEOUT_MS + SLACK_MS
  }

  /** None where that cannot be compared. */
  #expectedEnds(): string[] {
    if (this.#isInsisted || this.#isSecondItsOwn || this.#isListenerLate) return []
    const own = this.#without.isKilled ? [] : [describeEnd(this.#without)]
    const { way, moment, second } = this.#life
    // A busy program is told of both at once, and then of the one that has the lower number first.
    const { signalledAtMs, secondAtMs } = this.#withUs
    if (secondAtMs - signalledAtMs < SIGNAL_GRACE_MS) own.push(second)
    if (way === 'auto' || !isSignalOurs(this.#life) || moment === 'up') return own
    // In this moment it may be ours, or not yet.
    const ownOnce = moment === 'heard' ? own : []
    return [...ownOnce, ...this.#expectedEndsInCode(own)]
  }

  #expectedEndsInCode(own: string[]): string[] {
    const { listener, cleanUp } = this.#life
    const isFailing = cleanUp === 'throws' || cleanUp === 'endless'
    const status = isFailing ? 'status 1' : 'status 0'
    if (cleanUp === 'endless' || listener === 'none' || own[0] === 'status 0') return [status]
    return own
  }

  /** Without us the signal kills a program that does not listen for it yet. With us the program may
   *  do so by the time at which it is told. */
  get #isListenerLate(): boolean {
    const { listener, moment } = this.#life
    if (listener === 'none' || moment === 'up') return false
    // It finds its server listening by then.
    if (listener === 'exits unless listening' && moment !== 'serving') return true
    return [this.#withUs, this.#without].some((outcome) => {
      return this.#first(outcome, 'listens for signals') > outcome.signalledAtMs
    })
  }

  /** A second signal that comes when ours is over, or was never there, is the program's own
   *  affair. */
  get #isSecondItsOwn(): boolean {
    const { secondAtMs } = this.#withUs
    if (secondAtMs === Infinity) return false
    const listenerAtMs = this.#first(this.#withUs, 'listener begin')
    const cleanUpAtMs = this.#first(this.#withUs, 'cleanUp begin')
    return !this.#isInCharge || secondAtMs > Math.min(listenerAtMs, cleanUpAtMs)
  }

  #judgeRest(): void {
    const others = this.#without.leftBehind // a program that exits leaves the file of its socket
    for (const left of this.#withUs.leftBehind) {
      if (!others.includes(left)) this.faults.push(`left ${left} behind`)
    }
  }
}

function describeDisagreement(all: Verdict[], way: string, other: string): string | undefined {
  let turns: Verdict[] = []
  for (const verdict of all.filter((each) => each.way === way || each.way === other)) {
    const mayGoOn = turns.every((turn) => maybeBoth(turn, verdict))
    const last = turns.at(-1)
    if (!mayGoOn || !last) turns = [verdict]
    // What is asked at the same time may be answered before a change, and after it.
    else if (verdict.way !== last.way && verdict.askedAtMs >= last.answeredAtMs) turns.push(verdict)

    const [first = verdict, second = verdict] = turns
    const tookMs = verdict.answeredAtMs - first.askedAtMs
    if (turns.length < 4 || tookMs > DISAGREEMENT_MS) continue
    const green = first.isGreen ? first.way : second.way
    const red = first.isGreen ? second.way : first.way
    return `${green} is green, and ${red} is red, for ${tookMs} ms`
  }
  return undefined
}

/** Whether two answers may stand in one contradiction: each way goes on saying the same. */
function maybeBoth(turn: Verdict, verdict: Verdict): boolean {
  return (turn.way === verdict.way) === (turn.isGreen === verdict.isGreen)
}

function sign(ms: number): string {
  return ms < 0 ? String(ms) : `+${ms}`
}

function describeEnd({ status, signal }: Outcome): string {
  return signal ?? `status ${status}`
}

/** The requests that were accepted, and lost. */
function lossesOf({ sent, events }: Outcome): Sent[] {
  const got = new Set<string>()
  for (const { kind, detail } of events) {
    if (kind === 'got') got.add(detail)
  }
  return sent.filter(({ id, kind, state, isFirst, bytes }) => {
    if (kind === 'endless') return false
    if (state === 'wrong') return true
    if (state === 'pending') return got.has(id)
    return state === 'broken' && (isFirst || got.has(id) || bytes > 0)
  })
}

// --- The run -------------------------------------------------------------------------------------

interface Options {
  lives: number
  seed: string
  jobs: number
  runtime: string
  monitor: string
  isShown: boolean
}

function readOptions(words: string[]): Options {
  const here = fileURLToPath(new URL('.', import.meta.url))
  const options: Options = {
    lives: 60,
    seed: '1',
    jobs: 3,
    runtime: process.execPath,
    monitor: resolve(here, '../monitor.js'),
    isShown: false
  }
  const rest = [...words]
  for (;;) {
    const word = rest.shift()
    if (word === undefined) return options
    if (word === '--show') {
      options.isShown = true
      continue
    }
    const value = rest.shift()
    if (value === undefined) throw new Error(`${word} needs a value`)
    if (word === '--lives') options.lives = Number(value)
    else if (word === '--seed') options.seed = value
    else if (word === '--jobs') options.jobs = Number(value)
    else if (word === '--runtime') options.runtime = value
    else if (word === '--monitor') options.monitor = resolve(value)
    else throw new Error(`there is no option ${word}`)
  }
}

/** The lives of a seed; a seed with a colon is one life. */
function namesOf({ seed, lives }: Options): string[] {
  if (seed.includes(':')) return [seed]
  return Array.from({ length: lives }, (_, index) => `${seed}:${index}`)
}

/** A self-signed certificate for all lives. */
function certify(folder: string): { keyFile: string; certFile: string } {
  const keyFile = join(folder, 'key.pem')
  const certFile = join(folder, 'cert.pem')
  const kind = '-x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2'.split(' ')
  const files = ['-keyout', keyFile, '-out', certFile]
  execFileSync('openssl', ['req', ...kind, '-subj', '/CN=localhost', ...files], { stdio: 'ignore' })
  return { keyFile, certFile }
}

interface Result {
  life: Life
  faults: string[]
  withUs: Outcome
}

async function liveTwice(run: Run, name: string): Promise<Result> {
  const life = drawLife(name, runtimeName(run.runtime))
  const port = await freePort()
  const without = await new Living(run, life, false, port).live()
  const withUs = await new Living(run, life, true, port).live()
  const faults = new Judge(life, withUs, without).judge()
  if (run.isShown) showOutcomes(withUs, without)
  return { life, faults, withUs }
}

function showOutcomes(withUs: Outcome, without: Outcome): void {
  for (const outcome of [without, withUs]) {
    const { signalledAtMs, endedAtMs, isKilled, sent, log } = outcome
    const tookMs = endedAtMs - signalledAtMs
    const end = isKilled ? 'killed by the trial' : describeEnd(outcome)
    console.log(`  ${outcome === withUs ? 'with us' : 'without us'}: ${end} after ${tookMs} ms`)
    console.log(`    ${sent.length} requests, ${lossesOf(outcome).length} lost; ${log}`)
    for (const { atMs, kind, detail } of outcome.events) {
      if (kind === 'verdict') continue
      console.log(`    ${sign(atMs - signalledAtMs)} ${kind} ${detail}`)
    }
    for (const { way, isGreen, askedAtMs, answeredAtMs } of outcome.verdicts) {
      const times = `${sign(askedAtMs - signalledAtMs)} to ${sign(answeredAtMs - signalledAtMs)}`
      console.log(`    ${times} ${way} is ${isGreen ? 'green' : 'red'}`)
    }
  }
}

function printResult({ life, faults }: Result): void {
  if (faults.length === 0) return
  console.log(`FAILED ${life.name}: ${describeLife(life)}`)
  for (const fault of faults) console.log(`  - ${fault}`)
}

/** Counts of what there was, as `http 12, https 4`. */
function tally(kinds: string[]): string {
  const counts = new Map<string, number>()
  for (const kind of kinds) counts.set(kind, (counts.get(kind) ?? 0) + 1)
  return Array.from(counts, ([kind, count]) => `${kind} ${count}`).join(', ')
}

/** Without what is of this life alone: `lost 2 of 9 requests (…` is `lost requests`. */
function kindOfFault(fault: string): string {
  const [sentence = ''] = fault.split(/[:(,]/)
  return sentence.replaceAll(/(\bof )?\br?\d+ (ms )?/g, '').trim()
}

function printSummary(results: Result[], seconds: number): void {
  const sent = results.flatMap(({ withUs }) => withUs.sent)
  const answered = sent.filter(({ state }) => state === 'answered')
  const failed = results.filter(({ faults }) => faults.length > 0)
  const lives = results.map(({ life }) => life)
  console.log(`${results.length} lives in ${seconds} s, each lived twice`)
  console.log(`  with us ${sent.length} requests sent, ${answered.length} answered`)
  console.log(`  servers: ${tally(lives.map(({ server }) => server))}`)
  console.log(`  listeners: ${tally(lives.map(({ listener }) => listener))}`)
  console.log(`  ways: ${tally(lives.map(({ way }) => way))}`)
  console.log(`  moments: ${tally(lives.map(({ moment }) => moment))}`)
  console.log(
    `  clients: ${tally(lives.flatMap(({ clients }) => clients.map(({ kind }) => kind)))}`
  )
  console.log(`  probers: ${tally(lives.map(({ prober }) => prober))}`)
  const kinds = results.flatMap(({ faults }) => faults.map(kindOfFault))
  if (kinds.length > 0) console.log(`  faults: ${tally(kinds)}`)
  console.log(`${failed.length} failed: ${failed.map(({ life }) => life.name).join(' ')}`)
}

async function main(words: string[]): Promise<void> {
  const options = readOptions(words)
  const { jobs, monitor, runtime, isShown } = options
  const folder = mkdtempSync(join(tmpdir(), 'ftw-lives-'))
  mkdirSync(folder, { recursive: true })
  const run: Run = { folder, ...certify(folder), monitor, runtime, isShown }
  process.on('exit', endChildren)
  for (const signal of ['SIGINT', 'SIGTERM']) process.on(signal, () => process.exit(130))
  const startedAtMs = performance.now()
  const names = namesOf(options)
  const results: Result[] = []
  const work = async (): Promise<void> => {
    for (;;) {
      const name = names.shift()
      if (name === undefined) return
      const result = await liveTwice(run, name)
      results.push(result)
      printResult(result)
    }
  }
  await Promise.all(Array.from({ length: jobs }, work))
  const seconds = Math.round((performance.now() - startedAtMs) / 1_000)
  printSummary(results, seconds)
  if (!isShown) rmSync(folder, { recursive: true, force: true })
  const hasFailed = results.some(({ faults }) => faults.length > 0)
  process.exitCode = hasFailed ? 1 : 0
}

const [, , role, ...otherWords] = process.argv
if (role === PROGRAM) {
  const setup = JSON.parse(process.env['LIFE'] ?? '{}') as Setup
  void new Program(setup).run()
} else {
  await main(role === undefined ? [] : [role, ...otherWords])
}
