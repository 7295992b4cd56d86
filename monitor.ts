#!/usr/bin/env node
// SPDX-License-Identifier: MIT
//
// ftw-monitor tells balancers, probes and people whether this Node.js instance may be sent
// requests. It listens at the instance's port + 80, warms the instance up, and answers commands:
//
//   const server = http.createServer(app)          $ printf 'health_check\n' | nc localhost 8160
//   start(server)                                  OK
//   server.listen(8080)
//
// A line, or a request over HTTP, names a command of the command table. Behind every command that
// tells how the instance is stands one verdict: "may it be sent requests, and if not, why".
//
// The order of the file: types, limits, state, start and stop, addresses, listening, the hook on
// the server, the verdict, databases, warm-up, draining and shutdown, the command table, commands,
// figures and status, the wire (lines, then HTTP), helpers, and the program, which may be deleted.

import * as http from 'node:http'
import * as net from 'node:net'

// --- Public types --------------------------------------------------------------------------------

/** What follows on a connection: its end, commands until `quit`, or lines for the same command. */
export type Mode = 'quit' | 'interactive' | 'more'

/** Who asked a command. */
export interface Connection {
  /** Sends text to the asker, just as it is. */
  write(text: string): void
  /** The asker's IP address; `undefined` on a Unix socket, and after the asker's reset. */
  readonly remoteAddress: string | undefined
  /** Whether the asker is on this machine. */
  readonly local: boolean
}

/** Replies by `connection.write` within 30 s, and may return, or resolve to, the mode to follow.
 *  The asker may leave arguments out. */
export type Command = (
  connection: Connection,
  ...args: (string | undefined)[]
) => Mode | void | Promise<Mode | void>

/** Who may run a command besides those who connect to the monitor port and send its line. */
export interface CommandOptions {
  /** Offer it as `GET /NAME/ARG…` too (default: no). Any web page can make a browser send a GET, so
   *  only for commands that change nothing. */
  http?: boolean
  /** Refuse askers that are not on this machine (default: no). Not together with `http`. */
  local?: boolean
}

/** An open connection of a database. */
export interface OpenConnection {
  /** Since when it is open: milliseconds since 1970, or a `Date`. */
  openedAt: number | Date
  /** What it is open for, in a few words. */
  info: string
}

/** What a database knows of itself, in whole numbers. What is left out is shown as -1. */
export interface Figures {
  /** Objects in the caches. */
  size?: number
  /** Objects in the caches that are loaded. */
  nonGhost?: number
  /** How many objects the caches may hold. */
  maxSize?: number
  /** Records that the cache has taken in so far. */
  recordsAdded?: number
  /** Bytes that the cache has taken in so far. */
  bytesAdded?: number
  /** Records that the cache has thrown out so far. */
  recordsEvicted?: number
  /** Bytes that the cache has thrown out so far. */
  bytesEvicted?: number
  /** How often the cache was asked so far. */
  accesses?: number
  /** Conflicts between writers so far. */
  conflicts?: number
  /** Conflicts that were not resolved. */
  unresolvedConflicts?: number
  /** Objects in the storage. */
  objects?: number
  /** The size of the storage in bytes. */
  bytes?: number
}

/** Whatever the instance cannot serve without. */
export interface Database {
  /** Whether the instance can do without it (default: no): it never makes the verdict red, and is a
   *  warning in `status`. */
  optional?: boolean
  /** Has 900 ms to answer; only `true` is connected. A check shares a question that is out. */
  isConnected(): boolean | Promise<boolean>
  /** Lists the open connections, for the command `monitor`. */
  connections?(): OpenConnection[] | Promise<OpenConnection[]>
  /** Gives figures, for `dbinfo`, `zeocache` and `perf_metrics`. */
  figures?(): Figures | Promise<Figures>
}

/** Counts `count` (1) more of what the service does; a `RangeError` for what is no number from
 *  0. */
export type Count = (count?: number) => void

/** Where the service counts what it does with a database. */
export interface Activity {
  /** Counts objects, rows or records that were read. */
  loads: Count
  /** Counts objects, rows or records that were written. */
  stores: Count
  /** Counts connections that were opened. */
  connections: Count
}

/** How the instance is, as `status()` gives it. What cannot be known is -1. */
export interface Status {
  /** Whether it may be sent requests. */
  healthy: boolean
  /** `OK`, or why not. */
  reason: string
  /** Where the instance is reached; '' before that is known. */
  url: string
  /** How long the process has run. */
  uptimeSeconds: number
  requestsInFlight: number
  /** Connections of WebSockets, say. */
  upgradedConnections: number
  /** The busy part of the last ten seconds, from 0 to 1. */
  eventLoopUtilization: number
  residentMemoryBytes: number
  warmup: SiteStatus[]
  databases: DatabaseStatus[]
  probers: ProberStatus[]
  /** `undefined` where it does not drain. */
  draining: DrainingStatus | undefined
}

/** How the warm-up of a site stands. */
export interface SiteStatus {
  site: string
  status: 'off' | 'waiting' | 'running' | 'warm' | 'failed'
  /** How long it took, or has run so far. */
  seconds: number
  /** Why it failed, '' if it did not. */
  failure: string
}

/** How a database is. */
export interface DatabaseStatus {
  name: string
  optional: boolean
  connected: boolean
  /** What is wrong with it, '' if nothing: `disconnected`, `timed out`, or `failed: REASON`. */
  trouble: string
  /** How long the last answer took. */
  answeredMs: number
}

/** An address that asks for the verdict. */
export interface ProberStatus {
  address: string
  askedSecondsAgo: number
  /** The mean of its last pauses. */
  intervalSeconds: number
}

/** How far draining is. */
export interface DrainingStatus {
  seconds: number
  /** How many probers must be told. */
  probers: number
  /** How many of them know. */
  probersInformed: number
}

/** What a warm-up performer is told. */
export interface Warmup {
  /** The path of the site, as it was registered: `/` or `/shop`. */
  site: string
  /** The site's address on this very instance. */
  url: string
  /** Aborts when the instance shuts down, or after 30 minutes. */
  signal: AbortSignal
}

/** Warms a site. It fails by throwing or rejecting. */
export type WarmupPerformer = (warmup: Warmup) => unknown

/** Takes the few lines that the monitor has to say. */
export type Logger = Pick<Console, 'info' | 'warn' | 'error'>

/** Where the monitor is to listen: on a host and port, or on a Unix socket. */
export interface Endpoint {
  /** An address of this machine, or a name of it. */
  host?: string
  /** A port, 0 for any free one. */
  port?: number
  /** The path of a Unix socket, in place of both. */
  path?: string
}

/** What `start` may be told. */
export interface StartOptions {
  /** An http, https or http2 server, listening or not yet. */
  server?: net.Server
  /** The instance's port. Default: the server's; without a server, `PORT`. */
  port?: number
  /** Scheme, name, port and path at which the instance reaches itself. Default: `FTW_MONITOR_URL`,
   *  else the address that the server is bound to. */
  url?: string
  /** Where the monitor listens. Default: `FTW_MONITOR_LISTEN`, else port + 80 on the instance's
   *  host. */
  listen?: Endpoint
  /** Default: `console`. */
  logger?: Logger
}

/** Where the monitor listens, as `net.Server.address()` gives it; `false` where it does not. */
export type Address = net.AddressInfo | string | false

/** What `drain` may be told. */
export interface DrainOptions {
  /** What probers are told (default: `Draining`). */
  reason?: string
  /** How many red answers in a row make a balancer act: its own `fall` (default: 3). */
  fall?: number
  /** The longest wait in milliseconds (default: 25,000, since Kubernetes kills after 30 s). */
  timeoutMs?: number
}

/** What `shutdown` and `shutdownOnSignal` may be told, besides what `drain` may. */
export interface ShutdownOptions extends DrainOptions {
  /** Called at once, beside all the rest: for consumers of queues and schedulers, which are to take
   *  no more jobs. `signal` is what came, `undefined` for `shutdown()`. */
  onSignal?(shutdown: { signal: NodeJS.Signals | undefined }): unknown
  /** Called when no request is in flight any more: closes databases, says goodbye to WebSockets.
   *  May return a promise. */
  cleanUp?(shutdown: { signal: NodeJS.Signals | undefined }): unknown
  /** For draining and the requests in flight together, in milliseconds (default: 25,000); what
   *  is in flight then is cut. */
  timeoutMs?: number
  /** For everything, in milliseconds (default: `timeoutMs` + 3,000, so below Kubernetes's 30 s).
   *  What takes longer is named in the log, and the process exits with 1. */
  exitAfterMs?: number
  /** For `shutdownOnSignal`: what to listen for (default: `SIGTERM` and `SIGINT`). */
  signals?: NodeJS.Signals[]
}

// --- Limits --------------------------------------------------------------------------------------

// Of the instance
const PORT_OFFSET = 80 // as in ftw.monitor
const TICK_MS = 250 // of the one timer behind most limits; a warm-up is to abort within a second
const LISTEN_RETRY_MS = 1_000 // an old process may hold our port a little longer
const LISTEN_WARNING_MS = 10_000 // by then somebody awaits start(server) before listen()
const ACCEPT_WARNING_MS = 20_000 // ftw.monitor's grace

// Of the verdict
const DATABASE_MS = 900 // to answer; Kubernetes waits for one second
const QUESTION_MS = 30_000 // until a database is asked anew: a cut connection never answers
const LOOK_MS = 900 // to connect to the instance; the same second
const LOOK_AGAIN_MS = 1_000 // so that many probers cost one connection a second
const REASON_MAX = 500 // characters; balancers show less

// Of the warm-up
const VIEW_MS = 10_000 // until the view has seen our token: some routes never answer
const PAGE_WARNING_MS = 10_000 // by then a page is not slow, but silent
const WARMUP_MS = 30 * 60_000 // for one run, as in ftw.monitor
const WARMUP_RETRY_MS = 1_000 // doubled from try to try
const WARMUP_RETRY_MAX_MS = 30_000 // so that an instance is back soon after what it needs is back

// Of draining
const PROBER_ASKS = 3 // who asks less often within PROBER_MS is a person, not a balancer
const PROBER_MS = 60_000
const PROBERS_MAX = 64 // more than anybody has balancers
const LOOKUPS_PER_TICK = 128 // an address costs a system call; under a flood, drain waits longer
const QUIET_MS = 100 // without a request: a balancer must still read the last answer
const DRAIN_POLL_MS = 25

// Of a shutdown
const EXIT_MARGIN_MS = 3_000 // after timeoutMs: for WebSockets to end, and for cleanUp
const GOODBYE_MS = 1_000 // for cleanUp to say goodbye, and for a peer to answer it
const ALIVE_MS = 1_000 // for a process that is done to end by itself
const TIMER_MAX_MS = 2 ** 31 - 1 // what setTimeout takes
const REQUESTS_PER_SWEEP = 1_000 // of requests that have ended without an event, without a monitor

// Of figures
const HISTORY_SECONDS = 3_600 // as far as zc.z3monitor looks back
const LOAD_SAMPLES = 40 // of the event loop, one a tick: ten seconds
const TICKS_PER_SECOND = 1_000 / TICK_MS
const CHART_SECONDS = 120 // two minutes on the page
const LAG_SECONDS = 30 // longer than a scrape's interval, so that no delay falls between two
const COLLECTOR_MS = 5_000 // half of Prometheus's own limit
const LOG_MS = 1_000 // between failures of one command, so that nobody can flood the host's log

// Of a connection
const LINE_MAX = 4_096 // bytes: more than any command needs, and little of the host's memory
const LINES_PER_TURN = 16 // of one connection, then the application has its turn
const REQUESTS_PER_CONNECTION = 100 // the same for HTTP, where Node.js takes all there are at once
const CONNECTIONS_MAX = 256 // of the usual 1,024 descriptors; the others are for the application
const SEND_MS = 60_000 // for a line or an HTTP head: people type
const SILENCE_MS = 15 * 60_000 // in interactive mode: people think
const COMMAND_MS = 30_000 // by then every prober has given up
const LINGER_MS = 5_000 // for a peer to close after us
const UNSENT_MAX = 1_048_576 // bytes of a reply that nobody has taken when more is to be written

// --- State ---------------------------------------------------------------------------------------

const commands = new Map<string, Entry>()
const databases = new Map<string, RegisteredDatabase>()
const performers = new Map<string, WarmupPerformer>()
const collectors: Collector[] = []

/** Where the instance is reached. */
interface Instance {
  host: string
  port: number | undefined
  /** Its Unix socket, if it is on one. */
  path: string | undefined
  url: string
}

/** A request of the host's that is being served. */
interface RequestInFlight {
  startedAtMs: number
  /** Method and URL. */
  line: string
  socket: net.Socket
}

/** An HTTP/2 session; its own type is in a module that we do not import. */
interface Http2Session {
  close(): void
  destroy(): void
  /** Also once it has closed and no stream is left, while its client may still keep the
   *  connection. */
  readonly destroyed: boolean
  once(event: 'close', listener: () => void): void
}

/** The server that `start` was given, and what passes through it. It is kept, and its requests are
 *  seen, even where there is no monitor, since `shutdown` waits for them. */
class Application {
  readonly server: net.Server | undefined
  readonly logger: Logger
  unhook: () => void = doNothing
  restoreClose: () => void = doNothing
  /** Once `shutdown` has closed the server. */
  isClosing = false
  readonly inFlight = new Map<http.ServerResponse, RequestInFlight>()
  /** All of them; of TLS that below it. Node.js itself forgets some, as before their handshake. */
  readonly connections = new Set<net.Socket>()
  /** Connections of WebSockets, say: no request is in flight there. */
  readonly upgraded = new Set<net.Socket>()
  readonly http2Sessions = new Set<Http2Session>()
  /** The newest response of each connection, while draining. Only that one may carry `Connection:
   *  close`, since Node.js drops whatever was pipelined behind such a response. */
  readonly lastOfConnection = new WeakMap<net.Socket, http.ServerResponse>()
  /** Responses that close their connection, since each `drain` comes by again. */
  readonly sentElsewhere = new WeakSet<http.ServerResponse>()
  requests = 0
  errors = 0
  /** One listener for all responses: a closure for each would cost more than all else here. */
  readonly onResponseClose: (this: http.ServerResponse) => void

  constructor(server?: net.Server, logger: Logger = console) {
    this.server = server
    this.logger = logger
    const requestEnded = (response: http.ServerResponse): void => this.requestEnded(response)
    this.onResponseClose = function onResponseClose() {
      requestEnded(this)
    }
  }

  requestEnded(response: http.ServerResponse): void {
    const wasInFlight = this.inFlight.delete(response)
    if (wasInFlight && response.statusCode >= 500) this.errors++
  }
}

/** Counts time by ticks. It does not advance while the application blocks the event loop, so that
 *  clients are not blamed for that. */
class Clock {
  ticker: ReturnType<typeof setInterval> | undefined
  nowMs = 0
  /** What is to be done, and when. */
  readonly due = new Map<() => void, number>()
}

/** Our own server. */
class Monitor {
  endpoint: net.ListenOptions = {}
  server: net.Server | undefined
  /** Resolves when the server listens or cannot: Node.js looks up an address, too, before it
   *  listens. */
  opened: Promise<void> = Promise.resolve()
  /** A fixed number of places: a Map was measured to keep closed sockets in memory. */
  readonly sessions = Array<Session | undefined>(CONNECTIONS_MAX).fill(undefined)
}

/** A second of the instance's life. */
interface Second {
  utilization: number
  requests: number
  /** The largest delay of our tick. */
  lagMs: number
}

/** How busy the event loop is. */
class Load {
  samples: object[] = []
  /** From 0 to 1, over the last ten seconds; -1 where the runtime cannot tell. */
  utilization = -1
  tickedAtMs = 0
  ticks = 0
  /** How many requests there had been when the last second began. */
  requestsBefore = 0
  lagMs = 0
  seconds: Second[] = []
}

/** The warm-up of some sites, one after the other. */
interface Run {
  sites: string[]
  controller: AbortController
  /** Resolves to why it failed, '' if it did not. */
  done: Promise<string>
}

/** The result of our last connection to an instance whose server we were not given. */
class Look {
  atMs = -Infinity
  isRefused = false
  pending: Promise<void> | undefined
}

class WarmupState {
  /** What the last run came to; while one runs, `warmupStage()` says `running` instead. */
  outcome: 'off' | 'cold' | 'done' | 'failed' = 'cold'
  failure = ''
  /** Each site whose warm-up has been started. */
  readonly sites = new Map<string, SiteStatus>()
  runningSinceMs = 0
  /** The first one is running, the others wait. */
  readonly runs: Run[] = []
  /** Our own request for the view bears this token. */
  readonly token: string = crypto.randomUUID()
  readonly viewController = new AbortController()
  isViewSeen = false
}

/** What is known of an address that asks for the verdict. */
class Prober {
  /** How many drained answers it had. */
  drainedAnswers = 0
  asks = 0
  /** When it asked the last few times, by our clock, in a ring: a new array each time, and a new
   *  place in the Map, were 5 % of a check. */
  readonly #askedAtMs = Array<number>(PROBER_ASKS).fill(-Infinity)

  ask(nowMs: number): void {
    this.#askedAtMs[this.asks % PROBER_ASKS] = nowMs
    this.asks++
  }

  get lastAskedAtMs(): number {
    return this.#askedAtMs[(this.asks - 1) % PROBER_ASKS] ?? -Infinity
  }

  /** The mean of the pauses that are known. */
  get intervalMs(): number {
    const known = this.#askedAtMs.filter((atMs) => atMs > -Infinity)
    if (known.length < 2) return -1
    return (this.lastAskedAtMs - Math.min(...known)) / (known.length - 1)
  }

  /** -Infinity until it has asked PROBER_ASKS times. */
  get oldestAskMs(): number {
    return this.#askedAtMs[this.asks % PROBER_ASKS] ?? -Infinity
  }
}

class Probers {
  readonly known = new Map<string, Prober>()
  lookupsInTick = 0
}

interface Draining {
  reason: string
  /** How many drained answers a prober needs. */
  fall: number
  sinceMs: number
  /** Whoever must be told. */
  waitFor: Prober[]
}

/** A shutdown: it has begun, or it is over. */
class Shutdown {
  isOver = false
  /** What is still to be done, in words. */
  readonly undone = new Set<string>()
  done: Promise<void> = Promise.resolve()
}

/** All that `start` fills. `stop` puts a new one in its place, so that a late callback sees that
 *  its state is no longer the current one. */
class State {
  /** Undefined without a monitor: it was not started, is switched off, or gave up. */
  options: StartOptions | undefined
  /** Resolves what `start` promised. */
  resolveStart: (address: Address) => void = doNothing
  instance: Instance | undefined
  isAccepting = false
  draining: Draining | undefined
  app = new Application()
  readonly look = new Look()
  readonly clock = new Clock()
  readonly monitor = new Monitor()
  readonly load = new Load()
  readonly warmup = new WarmupState()
  probers = new Probers()
}

let state = new State()

/** Kept outside the state: the shutdown must go on even if the monitor gives up. */
let currentShutdown: Shutdown | undefined

/** Deno does not tell the number. */
type SignalListener = (signal: NodeJS.Signals, number?: number) => void

/** The signals that `shutdownOnSignal` listens for. */
const signalState = {
  listeners: new Map<NodeJS.Signals, SignalListener>(),
  /** Whether one has come: the next one ends the process. */
  isSignalled: false
}

function isCurrent(ownState: State): boolean {
  return ownState === state
}

// --- Start and stop ------------------------------------------------------------------------------

/** Starts the monitor: `start(server)`, `start({ server, … })`, or `start()` where `PORT` is set.
 *  Do not await it before `server.listen()`, since it waits for that. Resolves to the address at
 *  which the monitor listens, or, after one warning, to `false` where the environment does not
 *  allow it (an address in use is tried again). Rejects with a `TypeError` or `RangeError` for what
 *  the caller passed wrongly. */
export async function start(instance: net.Server | StartOptions = {}): Promise<Address> {
  const options = toStartOptions(instance)
  if (state.clock.ticker) {
    log('warn', 'is started already; stop() it first')
    return state.monitor.server?.address() ?? false
  }
  if (isShutdownRunning()) {
    log('warn', 'does not start: the instance is shutting down')
    return false
  }
  currentShutdown = undefined
  takeApplication(options)
  if (isSwitchedOff('FTW_MONITOR')) return false
  return new Promise((resolve) => begin(options, resolve))
}

/** Remembers the server, and sees its requests from now on. */
function takeApplication({ server, logger }: StartOptions): void {
  state.app.unhook()
  state.app = new Application(server, logger)
  if (server) state.app.unhook = hook(server, state.app)
}

function begin(options: StartOptions, resolveStart: (address: Address) => void): void {
  state.options = options
  state.resolveStart = resolveStart
  state.clock.ticker = setInterval(tick, TICK_MS).unref()
  state.load.tickedAtMs = performance.now()
  state.load.requestsBefore = state.app.requests
  if (isSwitchedOff('FTW_MONITOR_AUTOWARMUP')) state.warmup.outcome = 'off'

  schedule(options.server ? LISTEN_WARNING_MS : ACCEPT_WARNING_MS, warnUnlessAccepting)
  boot()
}

function warnUnlessAccepting(): void {
  if (state.isAccepting) return
  if (state.app.server) log('warn', 'waits for the server to listen')
  else log('warn', `finds nothing at ${state.instance?.url}`)
}

/** Closes the monitor and its connections, aborts what runs, takes its hook off the server and,
 *  unless a shutdown has begun, its listeners off the signals. Resolves when the port is free. What
 *  was registered stays, and `start()` works again. */
export async function stop(): Promise<void> {
  const { app, resolveStart } = state
  if (isShutdownRunning()) {
    await closeMonitor(stateOfApplication(app)) // whose requests the shutdown still waits for
  } else {
    takeSignalListenersOff()
    app.unhook()
    await closeMonitor(stateOfApplication(new Application(undefined, app.logger)))
  }
  resolveStart(false)
}

/** Puts another state in the place of the present one, and ends all that belonged to that. */
async function closeMonitor(next: State): Promise<void> {
  const closing = state
  if (closing.monitor.server?.listening) log('info', 'closed')
  state = next

  abortWarmups(closing.warmup, 'the monitor was stopped')
  clearInterval(closing.clock.ticker)
  closing.clock.due.clear()
  for (const session of closing.monitor.sessions) session?.cutOff()
  await closeAndWait(closing.monitor)
}

/** A fresh state that keeps only the application's server. */
function stateOfApplication(app: Application): State {
  const next = new State()
  next.app = app
  return next
}

async function closeAndWait({ server, opened }: Monitor): Promise<void> {
  if (!server?.listening) {
    await opened // then onMonitorListening closes it
    return
  }
  await new Promise((resolve) => server.close(resolve))
}

const START_OPTIONS = ['server', 'port', 'url', 'listen', 'logger']

function toStartOptions(instance: unknown): StartOptions {
  const options: unknown = isServer(instance) ? { server: instance } : instance
  must(
    hasOnly(options, START_OPTIONS),
    'start() takes an http.Server (app.listen() of Express, fastify.server), or ' +
      START_OPTIONS.join(', ')
  )

  const { server, port, url, listen, logger = console } = options
  must(server === undefined || isServer(server), 'server must be an http, https or http2 server')
  must(url === undefined || (typeof url === 'string' && toUrl(url)), URL_SENTENCE)
  must(listen === undefined || isEndpoint(listen), 'listen must be { host, port } or { path }')
  must(hasMethods(logger, 'info', 'warn', 'error'), 'logger must have info, warn and error')
  checkPort(port, listen)
  return options
}

const URL_SENTENCE = 'url must be an http or https URL, without query'

function checkPort(port: unknown, listen: unknown): void {
  if (port === undefined) return
  const Kind = typeof port === 'number' ? RangeError : TypeError
  must(isPort(port) && port > 0, 'port must be a number from 1 to 65535', Kind)

  if (listen !== undefined || readEnv('FTW_MONITOR_LISTEN') !== undefined) return
  must(
    isPort(port + PORT_OFFSET),
    'the monitor belongs at port + 80, which is no port: say port or listen',
    RangeError
  )
}

/** https and http2 servers are no `http.Server`, but do the same; a `net.Server` lacks
 *  setTimeout. */
function isServer(value: unknown): value is net.Server {
  return hasMethods(value, 'listen', 'emit', 'setTimeout')
}

function isEndpoint(value: unknown): boolean {
  if (!isObject(value)) return false
  return Object.entries(value).every(([name, part]) => {
    if (part === undefined) return true
    if (name === 'port') return isPort(part)
    return (name === 'host' || name === 'path') && typeof part === 'string' && part !== ''
  })
}

// The clock

function tick(): void {
  state.clock.nowMs += TICK_MS
  state.probers.lookupsInTick = 0
  measureLoad(state)
  boot()
  // A page that hangs in its warm-up would keep alive a process that has closed its server.
  if (warmupStage() === 'running' && isLookDue(state)) void lookAtInstance(state)
  if (isShuttingDown()) abortWarmups(state.warmup, 'the instance is shutting down')
  doWhatIsDue()
  for (const session of state.monitor.sessions) session?.enforceLimit()
  forgetDeadRequests(state.app)
}

function doWhatIsDue(): void {
  const { clock } = state
  for (const [task, dueAtMs] of clock.due) {
    if (dueAtMs > clock.nowMs) continue
    clock.due.delete(task)
    task()
  }
}

/** Does something after some time, unless stop() comes first. */
function schedule(ms: number, task: () => void): void {
  state.clock.due.set(task, state.clock.nowMs + ms)
}

/** Resolves after some time; never after stop(). */
function pause(ms: number): Promise<void> {
  return new Promise((resolve) => schedule(ms, resolve))
}

// From started to accepting

/** Takes the next steps from started to accepting, as far as they can be taken now. */
function boot(): void {
  const ownState = state
  const { server } = ownState.app
  if (ownState.isAccepting || server?.listening === false) return

  if (!ownState.instance) openBesideInstance(ownState)
  if (!isCurrent(ownState)) return // it gave up
  if (server) acceptRequests(ownState)
  else void lookAtInstance(ownState)
}

/** Finds out where the instance is, and opens the monitor port beside it. */
function openBesideInstance(ownState: State): void {
  const { options = {} } = ownState
  try {
    const bound = boundAddress(options)
    ownState.instance = locateInstance(options, bound)
    ownState.monitor.endpoint = monitorEndpoint(options, bound)
  } catch (error) {
    giveUp(error)
    return
  }
  openMonitor()
}

function acceptRequests(ownState: State): void {
  if (!isCurrent(ownState) || ownState.isAccepting) return
  ownState.isAccepting = true
  if (ownState.warmup.outcome !== 'off') void warmUpAutomatically()
}

/** A wrong setting of a deployment costs a warning and the monitor, never the application. */
function giveUp(error: unknown): void {
  const { app, resolveStart } = state
  log('warn', errorText(error))
  void closeMonitor(stateOfApplication(app))
  resolveStart(false)
}

// --- Addresses -----------------------------------------------------------------------------------

/** What the instance is bound to; the address is '' where it is bound to none in particular. */
interface Bound {
  address: string
  port: number | undefined
  path: string | undefined
}

/** Gives the host at which this machine reaches what is bound to an address, or to all of them. */
function hostReaching(address: string): string {
  if (address === '') return 'localhost'
  if (address === '0.0.0.0') return '127.0.0.1'
  // A machine without IPv6 binds :: all the same, but has no ::1; `localhost` always works.
  return address === '::' ? 'localhost' : address
}

function boundAddress({ server, port }: StartOptions): Bound {
  if (!server) {
    const text = readEnv('PORT')
    if (port === undefined && isPath(text)) return { address: '', port, path: text }
    const instancePort = port ?? readEnvAs('PORT', toPort)
    if (instancePort === undefined) failWith('needs a port: set PORT, or start(server)')
    return { address: readEnv('HOST') ?? '', port: instancePort, path: undefined }
  }

  const bound = server.address()
  if (typeof bound === 'string') return { address: '', port, path: bound }
  return { address: bound?.address ?? '', port: port ?? bound?.port, path: undefined }
}

function locateInstance({ server, url }: StartOptions, { address, port, path }: Bound): Instance {
  const host = hostReaching(address)
  const isSecure = server !== undefined && 'setSecureContext' in server
  const origin = `${isSecure ? 'https' : 'http'}://${hostInUrl(host)}`
  const ownUrl = port ? `${origin}:${port}` : origin
  const toldUrl = url ?? readEnvAs('FTW_MONITOR_URL', toUrl)
  return { host, port, path, url: (toldUrl ?? ownUrl).replace(/\/+$/, '') }
}

/** Where the monitor is to listen. */
function monitorEndpoint({ listen }: StartOptions, bound: Bound): net.ListenOptions {
  const told = listen ?? endpointInEnvironment()
  // exclusive: the workers of a cluster would share the port, and answer for each other
  if (told.path !== undefined) return { exclusive: true, path: told.path }

  const host = told.host ?? bound.address
  const port = told.port ?? (bound.port ?? NaN) + PORT_OFFSET
  if (!isPort(port)) failWith('finds no port at the instance port + 80: set FTW_MONITOR_LISTEN')
  return host ? { exclusive: true, port, host } : { exclusive: true, port }
}

/** A server may close, and listen elsewhere before its `close` event. */
function hasMoved(options: StartOptions, instance: Instance): boolean {
  const { address, port, path } = boundAddress(options)
  const isThere = port === instance.port && path === instance.path
  return !isThere || hostReaching(address) !== instance.host
}

function toConnectOptions({ host, port, path }: Instance): net.NetConnectOpts {
  return path === undefined ? { host, port: port ?? 0 } : { path }
}

function endpointInEnvironment(): Endpoint {
  return readEnvAs('FTW_MONITOR_LISTEN', toEndpoint) ?? {}
}

/** Reads `8160`, `host:8160`, `[::1]:8160`, or a path. */
function toEndpoint(text: string): Endpoint | undefined {
  if (isPath(text)) return { path: text }

  const [, ipv6, name, digits] = HOST_AND_PORT.exec(text) ?? []
  const port = Number(digits)
  if (!isPort(port)) return undefined
  const host = ipv6 ?? name
  return host ? { host, port } : { port }
}

function isPath(text = ''): boolean {
  return /[/\\]/.test(text)
}

const HOST_AND_PORT = /^(?:\[(.+)\]:|([^:[\]]+):)?(\d+)$/ // [::1]:8160, host:8160, 8160

function isPort(value: unknown): value is number {
  return Number.isInteger(value) && Number(value) >= 0 && Number(value) <= 65_535
}

/** A port that can be connected to. */
function toPort(text: string): number | undefined {
  const port = Number(text)
  return isPort(port) && port > 0 ? port : undefined
}

function toUrl(text: unknown): string | undefined {
  const url = String(text)
  return /^https?:[^?#]+$/i.test(url) && URL.canParse(url) ? url : undefined
}

function hostInUrl(host: string): string {
  return net.isIPv6(host) ? `[${host}]` : host
}

// Whether somebody listens there

/** Without the server, only a connection tells whether the instance accepts them. Callers that come
 *  while one is tried get the same promise. */
function lookAtInstance(ownState: State): Promise<void> {
  const { look } = ownState
  look.pending ??= tryConnection(ownState)
  return look.pending
}

async function tryConnection(ownState: State): Promise<void> {
  const { look, instance } = ownState
  const outcome = instance ? await connectionOutcome(toConnectOptions(instance)) : 'unknown'
  look.pending = undefined
  look.atMs = performance.now()
  if (outcome === 'unknown') return // a full backlog, say: what was seen last still holds
  look.isRefused = outcome === 'refused'
  if (outcome === 'accepted') acceptRequests(ownState)
}

function connectionOutcome(to: net.NetConnectOpts): Promise<'accepted' | 'refused' | 'unknown'> {
  return new Promise((resolve) => {
    const socket = attempt(() => net.connect(to)) // it throws where permissions forbid it
    if (!socket) {
      resolve('unknown')
      return
    }
    socket.unref()
    socket.setTimeout(LOOK_MS, () => {
      socket.destroy()
      resolve('unknown')
    })
    socket.on('connect', () => {
      socket.destroy()
      resolve('accepted')
    })
    socket.on('error', (error) => resolve(isRefused(error) ? 'refused' : 'unknown'))
  })
}

/** A name may have several addresses, and an error for each. */
function isRefused(error: NodeJS.ErrnoException & { errors?: NodeJS.ErrnoException[] }): boolean {
  const { errors = [error] } = error
  const relevant = errors.filter((each) => !isWithoutIpv6(each))
  return relevant.length > 0 && relevant.every(({ code = '' }) => REFUSED.has(code))
}

const REFUSED = new Set(['ECONNREFUSED', 'ENOENT']) // ENOENT: of a Unix socket

function isWithoutIpv6({
  code = '',
  address
}: NodeJS.ErrnoException & { address?: string }): boolean {
  return address === '::1' && NO_IPV6.has(code)
}

const NO_IPV6 = new Set(['EADDRNOTAVAIL', 'EAFNOSUPPORT', 'ENETUNREACH'])

/** Whether it is time to look again at an instance whose server was not given. */
function isLookDue({ app, look, instance }: State): boolean {
  if (app.server || !instance) return false
  return performance.now() - look.atMs > LOOK_AGAIN_MS
}

// --- Listening -----------------------------------------------------------------------------------

function openMonitor(isRetry = false): void {
  const ownState = state
  const server = net.createServer({ allowHalfOpen: true }, openSession).unref()
  ownState.monitor.server = server
  server.on('listening', () => onMonitorListening(ownState, server))
  server.on('error', (error) => onMonitorError(ownState, server, error, isRetry))
  const { promise: opened, resolve: endOpening } = deferred<void>()
  ownState.monitor.opened = opened
  server.once('listening', () => endOpening())
  server.once('error', () => endOpening())
  try {
    server.listen(ownState.monitor.endpoint)
  } catch (error) {
    server.emit('error', error) // thrown by Node.js where its permissions forbid listening
  }
}

function onMonitorListening(ownState: State, server: net.Server): void {
  if (!isCurrent(ownState)) {
    server.close() // stopped while a name was looked up
    return
  }
  const address = server.address() ?? ''
  log('info', `listening on ${describeAddress(address)}`)
  ownState.resolveStart(address)
}

function describeAddress(address: net.AddressInfo | string): string {
  if (typeof address === 'string') return address
  return `${hostInUrl(address.address)}:${address.port}`
}

function onMonitorError(
  ownState: State,
  server: net.Server,
  error: NodeJS.ErrnoException,
  isRetry: boolean
): void {
  if (!isCurrent(ownState) || server.listening) return // it could not accept a connection

  const text = `cannot listen: ${errorText(error)}`
  const advice = PASSING_ERRORS.get(error.code)
  if (advice === undefined) {
    giveUp(new Refusal(`${text}; set FTW_MONITOR_LISTEN`))
    return
  }
  if (!isRetry) log('warn', `${text}; tries every second; ${advice}`)
  ownState.resolveStart(false)
  schedule(LISTEN_RETRY_MS, () => openMonitor(true))
}

/** Errors that may go away, with advice if they do not. */
const PASSING_ERRORS = new Map<string | undefined, string>([
  [
    'EADDRINUSE',
    'an older process may hold it; cluster workers need FTW_MONITOR_LISTEN each; remove a dead path'
  ],
  ['EADDRNOTAVAIL', 'the address may come late to its interface; else set FTW_MONITOR_LISTEN']
])

// --- The hook on the server ----------------------------------------------------------------------

/** Wraps the server's `emit`, through which everything passes; gives what takes it off again. */
function hook(server: net.Server, app: Application): () => void {
  // oxlint-disable-next-line typescript/unbound-method -- it is applied to the server below
  const innerEmit = server.emit
  const ownEmit = Object.getOwnPropertyDescriptor(server, 'emit')

  function emit(this: net.Server, ...all: [string, ...unknown[]]): boolean {
    const isOurs = state.app === app // a later wrapper may still call this one after stop()
    if (isOurs && attempt(() => onServerEvent(...all)) === 'taken') return true
    return Reflect.apply(innerEmit, this, all)
  }
  Object.defineProperty(server, 'emit', { value: emit, configurable: true, writable: true })

  return () => {
    if (server.emit !== emit) return // whoever hooked in later still calls us
    Reflect.deleteProperty(server, 'emit')
    // Reflect's function never throws, whatever became of the server.
    if (ownEmit) Reflect.defineProperty(server, 'emit', ownEmit)
  }
}

/** Sees each event before the host does; what is taken, the host does not see. */
function onServerEvent(event: string, ...args: unknown[]): 'taken' | void {
  switch (event) {
    case 'connection':
      return trackUntilClose(state.app.connections, args[0] as net.Socket)
    case 'listening':
      return onServerListening()
    case 'close':
      return onServerClose()
    case 'request':
    case 'checkContinue':
      return onRequest(args[0] as http.IncomingMessage, args[1] as http.ServerResponse)
    case 'upgrade':
    case 'connect':
      return trackUntilClose(state.app.upgraded, args[1] as net.Socket)
    case 'session':
      return trackUntilClose(state.app.http2Sessions, args[0] as Http2Session)
  }
}

function onServerListening(): void {
  const { options, resolveStart } = state
  if (!options) return
  const isMoved = state.instance !== undefined && hasMoved(options, state.instance)
  if (isMoved) void closeMonitor(stateUntilListening())
  if (state.clock.ticker) boot()
  else begin(options, resolveStart)
}

/** The monitor closes with the server, and comes back when that listens again. */
function onServerClose(): void {
  if (currentShutdown || !isShuttingDown()) return // one that never listened emits `close` too
  void closeMonitor(stateUntilListening())
}

/** What an operator wanted still holds when the server listens again, and so do the probers that a
 *  drain waits for, whose times are by our clock. */
function stateUntilListening(): State {
  const next = stateOfApplication(state.app)
  next.options = state.options
  next.resolveStart = state.resolveStart
  next.draining = state.draining
  next.probers = state.probers
  next.clock.nowMs = state.clock.nowMs
  return next
}

function trackUntilClose<T extends net.Socket | Http2Session>(all: Set<T>, one: T): void {
  if (one.destroyed) return // its 'close' is past
  one.once('close', () => all.delete(one))
  all.add(one)
}

/** The application may emit `request` with anything, so everything here may throw. */
function onRequest(request: http.IncomingMessage, response: http.ServerResponse): 'taken' | void {
  const { method, url = '', socket } = request
  const { app, options } = state
  if (options && warmupSite(url) !== undefined) {
    warmupView(request, response)
    return 'taken'
  }
  if (app.inFlight.has(response)) return // emitted again, after checkContinue

  response.on('close', app.onResponseClose)
  const line = `${method} ${url}`
  app.inFlight.set(response, { startedAtMs: performance.now(), line, socket })
  app.requests++
  if (app.requests % REQUESTS_PER_SWEEP === 0) forgetDeadRequests(app) // where nothing ticks
  if (state.draining || app.isClosing) sendClientElsewhere(app, response, socket)
}

/** Some responses never get their 'close'. */
function forgetDeadRequests({ inFlight }: Application): void {
  for (const [response, { socket }] of inFlight) {
    const isDead = attempt(() => !socket || socket.destroyed || response.destroyed)
    if (isDead ?? true) inFlight.delete(response) // what cannot be looked at is not waited for
  }
}

// --- The verdict ---------------------------------------------------------------------------------

/** Tells whether this instance may be sent requests: reason `OK`, or why not, in one line that
 *  never contains `OK`. Answers within a second, and never rejects. */
export async function health(): Promise<{ healthy: boolean; reason: string }> {
  await inspect()
  const reason = verdict()
  return { healthy: reason === 'OK', reason }
}

/** Judges by what is known, and does nothing else; `inspect` comes before it. */
function verdict(): string {
  if (state.draining) return toRedLine(state.draining.reason)
  if (isShuttingDown()) return 'Instance is shutting down'

  const trouble = firstTrouble()
  if (trouble) return toRedLine(`Error: ${trouble}`)

  const stage = warmupStage()
  if (!state.isAccepting || stage === 'cold') return 'Instance is booting'
  if (stage === 'running') return 'Warmup in progress'
  if (stage === 'failed') return toRedLine(`Warmup failed: ${state.warmup.failure}`)
  return 'OK'
}

/** Asks what the verdict has to know. A promise only if there is something to wait for, since a
 *  promise is 15 % of a check. */
function inspect(): Promise<unknown> | undefined {
  if (state.draining) return undefined
  if (state.app.server && isShuttingDown()) return undefined
  if (databases.size === 0 && !isLookDue(state)) return undefined
  return inspectAll()
}

/** Also what the verdict does not need. */
function inspectAll(): Promise<unknown> {
  const questions: Promise<unknown>[] = Array.from(databases.values(), inspectDatabase)
  if (isLookDue(state)) questions.push(lookAtInstance(state))
  return Promise.all(questions)
}

/** Known at once after `server.close()`, where `close` comes only when the last request is gone. */
function isShuttingDown(): boolean {
  if (!state.isAccepting) return false
  const { server } = state.app
  return server ? !server.listening : state.look.isRefused
}

/** Makes one line of what is not healthy, in which HAProxy's `expect string OK` finds nothing. */
function toRedLine(text: string): string {
  return clean(text).replaceAll('OK', 'O K').slice(0, REASON_MAX)
}

// --- Databases and counters ----------------------------------------------------------------------

interface RegisteredDatabase {
  name: string
  isOptional: boolean
  counters: Record<keyof Activity, Counter>
  isConnected: SharedCall
  connections: SharedCall | undefined
  figures: SharedCall | undefined
  /** What was wrong with it when it was last asked, '' if nothing. */
  trouble: string
}

/** Registers a database, or replaces it. Gives the counters on which the service tells what it does
 *  with it. Throws a `TypeError` for a name with white space, and for what is no method. */
export function registerDatabase(name: string, database: Database): Activity {
  must(isWord(name), 'a database has a name without white space')
  must(
    hasMethods(database, 'isConnected') &&
      mayHaveMethod(database, 'connections') &&
      mayHaveMethod(database, 'figures'),
    'a database has isConnected(), and may have connections() and figures()'
  )
  must(['boolean', 'undefined'].includes(typeof database.optional), 'optional is true or false')
  const counters = { loads: new Counter(), stores: new Counter(), connections: new Counter() }
  const call = (ask: () => unknown): SharedCall => new SharedCall(ask, DATABASE_MS)
  databases.set(name, {
    name,
    isOptional: database.optional === true,
    counters,
    isConnected: call(() => database.isConnected()),
    connections: database.connections && call(() => database.connections?.()),
    figures: database.figures && call(() => database.figures?.()),
    trouble: 'disconnected' // until it was asked: a check may be under way
  })
  return {
    loads: (count) => counters.loads.add(count),
    stores: (count) => counters.stores.add(count),
    connections: (count) => counters.connections.add(count)
  }
}

/** Asks a database whether it is connected, and keeps what is wrong with it. */
async function inspectDatabase(registered: RegisteredDatabase): Promise<string> {
  registered.trouble = await findTrouble(registered)
  return registered.trouble
}

async function findTrouble({ isConnected }: RegisteredDatabase): Promise<string> {
  try {
    const answer = await isConnected.ask()
    return answer === true ? '' : 'disconnected'
  } catch (error) {
    return error === TIMED_OUT ? 'timed out' : `failed: ${errorText(error)}`
  }
}

/** What is wrong with the first database that the instance cannot do without, '' if nothing. */
function firstTrouble(): string {
  for (const registered of databases.values()) {
    if (registered.trouble && !registered.isOptional) return describeTrouble(registered)
  }
  return ''
}

/** In ftw.monitor's words. */
function describeTrouble({ name, trouble }: RegisteredDatabase): string {
  return `Database '${name}' ${trouble}${trouble.startsWith('failed') ? '' : '.'}`
}

const TIMED_OUT = new Error('no answer in time')

/** What those are waiting for who asked together. */
class Question {
  readonly askedAtMs = performance.now()
  readonly answer: Promise<unknown>
  readonly #settle: Deferred<unknown>
  readonly #timer: ReturnType<typeof setTimeout>

  constructor(limitMs: number) {
    this.#settle = deferred()
    this.answer = this.#settle.promise
    this.answer.catch(doNothing) // nobody may be waiting any more
    // setImmediate: after the application has blocked, read first what came in time.
    const timeOut = (): unknown => setImmediate(this.#settle.reject, TIMED_OUT)
    this.#timer = setTimeout(timeOut, limitMs).unref()
  }

  get ageMs(): number {
    return performance.now() - this.askedAtMs
  }

  resolve(answer: unknown): void {
    clearTimeout(this.#timer)
    this.#settle.resolve(answer)
  }

  reject(error: unknown): void {
    clearTimeout(this.#timer)
    this.#settle.reject(error)
  }
}

/** Calls a function of the application's. Whoever asks while a call is pending shares its
 *  answer, so that many probers cost one query. If a call hangs for 30 s, another one is
 *  started; the first that succeeds answers everybody who is waiting. */
class SharedCall {
  /** How long the last answer took, -1 if there was none. */
  answeredMs = -1
  readonly #call: () => unknown
  readonly #limitMs: number
  #open: Question | undefined

  constructor(call: () => unknown, limitMs: number) {
    this.#call = call
    this.#limitMs = limitMs
  }

  ask(): Promise<unknown> {
    if (this.#open && this.#open.ageMs < QUESTION_MS) return this.#open.answer
    const question = new Question(this.#limitMs)
    this.#open = question
    void this.#settle(question)
    return question.answer
  }

  async #settle(question: Question): Promise<void> {
    try {
      const answer: unknown = await this.#call()
      this.answeredMs = question.ageMs
      question.resolve(answer)
      this.#open?.resolve(answer)
      this.#open = undefined
    } catch (error) {
      question.reject(error)
      if (this.#open === question) this.#open = undefined
    }
  }
}

/** Counts events, and remembers an hour of them by the second. */
class Counter {
  total = 0
  /** The oldest second comes first. */
  readonly #countBySecond = new Map<number, number>()

  /** Takes `unknown`, since JavaScript may pass '3', which would be concatenated. */
  add(count: unknown = 1): void {
    const events = Number(count)
    must(events >= 0 && events < Infinity, 'a count must be a number from 0', RangeError)
    const second = Math.floor(performance.now() / 1_000)
    this.total += events
    this.#countBySecond.set(second, (this.#countBySecond.get(second) ?? 0) + events)
    if (this.#countBySecond.size > HISTORY_SECONDS) this.#forgetOldest()
  }

  last(seconds: number): number {
    const now = Math.floor(performance.now() / 1_000)
    let sum = 0
    for (const [second, count] of this.#countBySecond) {
      if (now - second < seconds) sum += count
    }
    return sum
  }

  #forgetOldest(): void {
    const [oldest] = this.#countBySecond.keys()
    if (oldest !== undefined) this.#countBySecond.delete(oldest)
  }
}

// --- Warm-up -------------------------------------------------------------------------------------

/** Registers what warms a site, a path such as `/` or `/shop`: after boot, and when this machine
 *  asks for `/@@warmup` or `/shop/@@warmup`. A site registered again is replaced. Throws a
 *  `TypeError` for what is no path or no function. */
export function registerWarmup(site: string, performer: WarmupPerformer): void {
  must(typeof site === 'string' && SITE.test(site), 'a site is / or /a/path')
  must(typeof performer === 'function', 'a warm-up performer is a function')
  performers.set(withoutSlashes(new URL(site, 'http://localhost').pathname) || '/', performer)
}

const SITE = /^\/(?![/\\])[^\s?#]*$/ // /shop

function allSites(): string[] {
  return performers.size > 0 ? [...performers.keys()] : ['/']
}

function warmupStage(): 'off' | 'cold' | 'running' | 'done' | 'failed' {
  return state.warmup.runs.length > 0 ? 'running' : state.warmup.outcome
}

/** Joins a run that covers these sites, or queues one. Resolves to why it failed, '' if not. */
function warmUp(sites: string[]): Promise<string> {
  const { runs } = state.warmup
  const covering = runs.find((run) => sites.every((site) => run.sites.includes(site)))
  if (covering) return covering.done

  const controller = new AbortController()
  const done = performRun(sites, controller, runs.at(-1)?.done)
  runs.push({ sites, controller, done })
  return done
}

async function performRun(
  sites: string[],
  controller: AbortController,
  runBefore: Promise<string> | undefined
): Promise<string> {
  const ownState = state
  const { clock, warmup } = ownState
  const { signal } = controller
  await runBefore

  const expire = (): void => {
    controller.abort(new Error(`no end after ${WARMUP_MS / 60_000} minutes`))
  }
  clock.due.set(expire, clock.nowMs + WARMUP_MS)
  if (!signal.aborted) log('info', `warms up ${sites.join(', ')}`)
  const results: SiteStatus[] = []
  for (const [index, site] of sites.entries()) {
    const result = await warmSite(ownState, site, signal)
    results.push(result)
    const { failure, seconds } = result
    if (!isCurrent(ownState)) continue
    const outcome = failure ? `failed (${failure})` : 'is warm'
    const text = `(${index + 1}/${sites.length}) ${site} ${outcome} after ${seconds.toFixed(1)} s`
    log(failure ? 'warn' : 'info', text)
  }
  clock.due.delete(expire) // work that goes on after the warm-up must not be aborted

  warmup.runs.shift()
  const failure = failureOf(results)
  const isWhole = allSites().every((site) => sites.includes(site))
  if (failure === '' && isWhole) warmup.outcome = 'done'
  return failure
}

/** Warms one site, and remembers how it went. */
async function warmSite(ownState: State, site: string, signal: AbortSignal): Promise<SiteStatus> {
  const { warmup, instance } = ownState
  const startedAtMs = performance.now()
  warmup.runningSinceMs = startedAtMs
  warmup.sites.set(site, { site, status: 'running', seconds: 0, failure: '' })

  const failure = await tryPerformer(site, `${instance?.url}${site}`, signal)
  const seconds = (performance.now() - startedAtMs) / 1_000
  const outcome: SiteStatus = { site, status: failure ? 'failed' : 'warm', seconds, failure }
  warmup.sites.set(site, outcome)
  return outcome
}

/** Why the performer failed, '' if it did not. A performer may not heed the signal. */
async function tryPerformer(site: string, url: string, signal: AbortSignal): Promise<string> {
  const performer = performers.get(site) ?? loadPage
  const { promise: aborted, resolve: endWait } = deferred<void>()
  const onAbort = (): void => endWait()
  signal.addEventListener('abort', onAbort)
  try {
    signal.throwIfAborted()
    await Promise.race([performer({ site, url, signal }), aborted])
    signal.throwIfAborted()
    return ''
  } catch (error) {
    return errorText(error)
  } finally {
    signal.removeEventListener('abort', onAbort)
  }
}

/** Why these sites are not warm, '' if they are. */
function failureOf(sites: SiteStatus[]): string {
  const failures: string[] = []
  for (const { site, failure } of sites) {
    if (failure) failures.push(site === '/' ? failure : `${site}: ${failure}`)
  }
  return failures.join('; ')
}

function abortWarmups({ viewController, runs }: WarmupState, reason: string): void {
  viewController.abort(new Error(reason))
  for (const { controller } of runs) controller.abort(new Error(reason))
}

/** After boot, until all is warm: one passing error must not keep an instance out for good. */
async function warmUpAutomatically(): Promise<void> {
  const ownState = state
  const { warmup } = ownState
  await askView(ownState)

  let pauseMs = WARMUP_RETRY_MS
  while (isCurrent(ownState) && warmup.outcome !== 'done') {
    while (isShuttingDown()) await pause(TICK_MS)

    const untried = allSites().filter((site) => !isTried(warmup, site))
    if (untried.length > 0) {
      await warmUp(untried) // joins a run that the view, or somebody by hand, has begun
      continue
    }
    warmup.failure = failureOf(allSites().map(siteStatus))
    if (warmup.failure === '') {
      warmup.outcome = 'done'
      return
    }
    warmup.outcome = 'failed'
    log('warn', `tries again in ${pauseMs / 1_000} s what failed to warm up: ${warmup.failure}`)
    await pause(pauseMs)
    forgetFailures(warmup)
    pauseMs = Math.min(pauseMs * 2, WARMUP_RETRY_MAX_MS)
  }
}

/** A site that is being warmed up again may still fail. */
function isTried({ sites }: WarmupState, name: string): boolean {
  const stage = sites.get(name)?.status
  return stage === 'warm' || stage === 'failed'
}

function forgetFailures({ sites }: WarmupState): void {
  for (const [name, site] of sites) {
    if (site.status === 'failed') sites.delete(name)
  }
}

const TOKEN_HEADER = 'x-ftw-monitor-token'

/** Begins at the view, since performers then run as the work of a request does. That the view is
 *  there is proved by our token alone: a catch-all route, or another worker, answers too. */
async function askView({ instance, warmup }: State): Promise<void> {
  if (!instance || instance.path !== undefined) return // fetch knows no Unix sockets

  schedule(VIEW_MS, () => {
    if (!warmup.isViewSeen) warmup.viewController.abort()
  })
  try {
    const answer = await fetch(`${instance.url}/@@warmup`, {
      headers: { [TOKEN_HEADER]: warmup.token },
      redirect: 'manual',
      signal: warmup.viewController.signal
    })
    await answer.body?.cancel()
  } catch {
    // What nobody answered is warmed up all the same, by the performers alone.
  }
}

/** The default performer: loads the page that the first visitor would have waited for. */
async function loadPage({ site, url, signal }: Warmup): Promise<void> {
  const code = await visit(url, signal)
  if (code >= 500) throw new Error(`it answered ${code}`)
  if (code >= 300) log('warn', `got ${code} for ${site}: nothing behind it was loaded`)
}

/** Gives the status of a page when all of it has come. Some servers answer nothing but upgrades. */
async function visit(url: string, signal: AbortSignal): Promise<number> {
  const { clock } = state
  const warn = (): void => {
    log('warn', `gets no answer from ${url}; if it never answers, register a warm-up performer`)
  }
  schedule(PAGE_WARNING_MS, warn)
  try {
    const isSecure = /^https:/i.test(url)
    return isSecure ? await visitByFetch(url, signal) : await visitByHttp(url, signal)
  } finally {
    clock.due.delete(warn)
  }
}

async function visitByFetch(url: string, signal: AbortSignal): Promise<number> {
  const page = await fetch(url, { redirect: 'manual', signal })
  await page.body?.pipeTo(new WritableStream())
  return page.status
}

/** Without fetch, which refuses some ports, goes through proxies, and gives up after 300 s. */
function visitByHttp(url: string, signal: AbortSignal): Promise<number> {
  const socketPath = state.instance?.path
  return new Promise((resolve, reject) => {
    const request = http.get(url, { agent: false, signal, socketPath }, (page) => {
      page.on('error', reject)
      page.on('end', () => resolve(page.statusCode ?? 0))
      page.resume()
    })
    request.on('error', reject)
    request.on('upgrade', (page) => {
      page.destroy()
      reject(new Error(`it answered ${page.statusCode}`))
    })
  })
}

/** Answers `GET /@@warmup` and `GET /SITE/@@warmup` of this machine when the warm-up is over: 200
 *  `Warmup successful` or 500 `Warmup failed: REASON`. It is there by itself where `start` has the
 *  server; else mount it: `app.use(warmupView)` in Express and Connect, `http.createServer((req,
 *  res) => warmupView(req, res, () => …))`. Other requests go to `next`, or are answered 404. */
export function warmupView(
  request: http.IncomingMessage,
  response: http.ServerResponse,
  next?: () => void
): void {
  const { url = '', originalUrl = url } = request as { url?: string; originalUrl?: string }
  const site = warmupSite(originalUrl) // Express cuts url
  if (site === undefined) {
    if (next) next()
    else answerView(response, 404, 'Not found')
    return
  }

  const isOurs = request.headers[TOKEN_HEADER] === state.warmup.token
  const refusal = viewRefusal(request, isOurs)
  if (refusal) {
    answerView(response, ...refusal)
    return
  }
  const sites = isOurs || site === '/' ? allSites() : allSites().filter((each) => each === site)
  if (sites.length === 0) {
    answerView(response, 404, 'No such site is registered')
    return
  }
  if (isOurs) state.warmup.isViewSeen = true
  void answerWhenWarm(response, sites)
}

function viewRefusal(
  request: http.IncomingMessage,
  isOurs: boolean
): [status: number, text: string] | undefined {
  if (!isOurs && !isFromHere(request)) return [403, 'Only this machine may ask for a warm-up']
  if (request.method !== 'GET') return [405, 'A warm-up is asked for by GET']
  if (!state.instance) return [503, 'The monitor is not started']
  return undefined
}

async function answerWhenWarm(response: http.ServerResponse, sites: string[]): Promise<void> {
  const failure = await warmUp(sites)
  try {
    if (failure) answerView(response, 500, toRedLine(`Warmup failed: ${failure}`))
    else answerView(response, 200, 'Warmup successful')
  } catch {
    // The application may have answered meanwhile.
  }
}

function answerView(response: http.ServerResponse, code: number, text: string): void {
  // A keep-alive connection of ours would delay server.close().
  sendClientElsewhere(state.app, response, response.req?.socket)
  response.writeHead(code, { 'Content-Type': PLAIN_TEXT })
  response.end(text)
}

/** The site of `/shop/@@warmup?now` is `/shop`, that of `/@@warmup` is `/`; undefined elsewhere. */
function warmupSite(url: string): string | undefined {
  const [, site] = WARMUP_URL.exec(url) ?? []
  return site === '' ? '/' : site
}

const WARMUP_URL = /^([^?]*)\/@@warmup(?:\?|$)/ // /shop/@@warmup?now

function isFromHere(request: http.IncomingMessage): boolean {
  if (TOKEN_HEADER in request.headers) return false // of another instance
  return isLocal(request.socket) && isOwnName(request) && !isForwarded(request, ['none'])
}

/** A web page on a name that was rebound to 127.0.0.1 comes from this machine, but bears its
 *  name. */
function isOwnName({ headers }: http.IncomingMessage): boolean {
  const host = headers.host ?? headers[':authority']?.toString()
  if (!host) return true // HTTP/1.0
  const name = nameInHost(host)
  if (name === 'localhost' || net.isIP(name) !== 0) return true
  return state.instance !== undefined && name === nameInHost(new URL(state.instance.url).host)
}

function nameInHost(host: string): string {
  const [, ipv6, name = ''] = HOST_HEADER.exec(host.toLowerCase()) ?? []
  return ipv6 ?? name
}

const HOST_HEADER = /^(?:\[(.+)\]|([^:]+))(?::\d+)?$/ // [::1]:8080, localhost:8080, localhost

// --- Draining and shutdown -----------------------------------------------------------------------

/** Takes the instance out: every verdict is the reason, and requests are served with `Connection:
 *  close`. Resolves when each prober was told `fall` times and no request is in flight, after
 *  `timeoutMs` at most, at once without a monitor. Rejects with a `TypeError` or `RangeError` for
 *  wrong options. */
export async function drain(options: DrainOptions = {}): Promise<void> {
  must(
    hasOnly(options, DRAIN_OPTIONS),
    `drain takes an object with any of ${DRAIN_OPTIONS.join(', ')}`
  )
  await untilDrained(options)
}

const DRAIN_OPTIONS = ['reason', 'fall', 'timeoutMs']

/** Takes the instance in again; not while it shuts down. */
export function resume(): void {
  if (currentShutdown) log('warn', 'does not resume: the instance is shutting down')
  else state.draining = undefined
}

/** Drains, reports each change of what it waits for, and gives the outcome. */
async function untilDrained(
  options: DrainOptions,
  report: (progress: string) => void = doNothing
): Promise<string> {
  const { reason, fall, timeoutMs } = toDrainOptions(options)
  if (!state.clock.ticker) return 'Drained'

  const waitFor = beginDraining(reason, fall)
  if (!isMonitorListening()) return 'Drained' // nobody can be told
  const startedAtMs = performance.now()
  let quietSinceMs = startedAtMs
  let requestsBefore = state.app.requests
  let progressBefore = ''
  while (state.draining?.waitFor === waitFor) {
    const progress = describeProgress(state.draining)
    if (progress !== progressBefore) report(`Draining: ${progress}`)
    progressBefore = progress

    const { inFlight, requests } = state.app
    const nowMs = performance.now()
    const isBusy = inFlight.size > 0 || requests !== requestsBefore
    if (isBusy || countInformed(state.draining) < waitFor.length) quietSinceMs = nowMs
    requestsBefore = requests
    if (nowMs - quietSinceMs >= QUIET_MS) return 'Drained'
    if (nowMs - startedAtMs >= timeoutMs) {
      return `Not drained after ${timeoutMs / 1_000} s: ${progress}`
    }
    await pollingPause()
  }
  return 'Not drained: resumed meanwhile'
}

function isMonitorListening(): boolean {
  return state.monitor.server?.listening ?? false
}

function toDrainOptions({
  reason = 'Draining',
  fall = 3,
  timeoutMs = 25_000
}: DrainOptions): Required<DrainOptions> {
  must(typeof reason === 'string' && clean(reason).trim(), 'reason must be text')
  must(Number.isInteger(fall) && fall > 0, 'fall must be a whole number from 1', RangeError)
  must(typeof timeoutMs === 'number', 'timeoutMs must be a number')
  must(timeoutMs >= 0, 'timeoutMs must be a number from 0', RangeError)
  return { reason, fall, timeoutMs }
}

/** Gives the probers that must be told; a second `drain` waits for the same as the first. */
function beginDraining(reason: string, fall: number): Prober[] {
  const { waitFor, sinceMs } = state.draining ?? {
    waitFor: frequentProbers(),
    sinceMs: performance.now()
  }
  state.draining = { reason, fall, waitFor, sinceMs }
  sendClientsElsewhere(state.app)
  return waitFor
}

/** Whoever asks often enough to be a balancer; from now on their drained answers count. */
function frequentProbers(): Prober[] {
  const { clock, probers } = state
  const frequent = [...probers.known.values()].filter(
    ({ oldestAskMs }) => clock.nowMs - oldestAskMs <= PROBER_MS
  )
  for (const prober of frequent) prober.drainedAnswers = 0
  return frequent
}

/** How many probers have had drained answers enough. */
function countInformed({ waitFor, fall }: Draining): number {
  return waitFor.filter(({ drainedAnswers }) => drainedAnswers >= fall).length
}

function describeProgress(draining: Draining): string {
  const probers = `${countInformed(draining)} of ${draining.waitFor.length} probers know`
  const { server, inFlight, upgraded } = state.app
  if (!server) return probers
  const progress = `${probers}, ${inFlight.size} requests in flight`
  return upgraded.size > 0 ? `${progress}, ${upgraded.size} upgraded connections` : progress
}

function pollingPause(): Promise<void> {
  return new Promise((resolve) => {
    setTimeout(resolve, DRAIN_POLL_MS).unref()
  })
}

// Probers

/** Remembers who asks, and how often whoever asked was told that the instance drains. */
function noteProber(asker: Asker, worth: number): void {
  if (asker.isPerson) return
  const address = addressOf(asker)
  if (address === undefined) return

  const prober = state.probers.known.get(address) ?? addProber(address)
  prober.drainedAnswers += worth
  prober.ask(state.clock.nowMs)
}

function addProber(address: string): Prober {
  const { known } = state.probers
  const prober = new Prober()
  if (state.draining) return prober // else a prober that we wait for might have to make room
  if (known.size >= PROBERS_MAX) forgetLongestSilent(known)
  known.set(address, prober)
  return prober
}

function forgetLongestSilent(known: Map<string, Prober>): void {
  let longestSilent = ''
  let sinceMs = Infinity
  for (const [address, { lastAskedAtMs }] of known) {
    if (lastAskedAtMs >= sinceMs) continue
    longestSilent = address
    sinceMs = lastAskedAtMs
  }
  known.delete(longestSilent)
}

/** In a flood we skip the lookup, and count all clients as one. */
function addressOf(asker: Asker): string | undefined {
  const { probers, draining, monitor } = state
  probers.lookupsInTick++
  if (!draining && probers.lookupsInTick > LOOKUPS_PER_TICK) return 'whoever'
  return asker.remoteAddress ?? monitor.endpoint.path
}

// Sending clients elsewhere

function sendClientsElsewhere(app: Application): void {
  for (const [response, { socket }] of app.inFlight) sendClientElsewhere(app, response, socket)
}

/** Has a keep-alive client go elsewhere with its next request; HTTP/2 knows GOAWAY for that. All
 *  else that the application answers stays as it is, byte for byte. */
function sendClientElsewhere(
  app: Application,
  response: http.ServerResponse,
  socket: net.Socket
): void {
  attempt(() => {
    const { stream } = response as { stream?: { session?: Http2Session } }
    app.lastOfConnection.set(socket, response)
    if (app.sentElsewhere.has(response)) return
    app.sentElsewhere.add(response)
    if (stream?.session) stream.session.close()
    else if (!response.headersSent) closeConnectionAfter(app, response, socket)
  })
}

/** A header set by us would change how `writeHead` treats the application's. So we only take the
 *  keep-alive away, and replace a `Connection: keep-alive` of the application's own in its
 *  place. */
function closeConnectionAfter(
  app: Application,
  response: http.ServerResponse,
  socket: net.Socket
): void {
  const { shouldKeepAlive } = response
  response.shouldKeepAlive = false

  // oxlint-disable-next-line typescript/unbound-method -- it is applied to its response below
  const innerWriteHead = response.writeHead

  function writeHead(this: http.ServerResponse, ...args: unknown[]): http.ServerResponse {
    if (app.lastOfConnection.get(socket) !== response) {
      response.shouldKeepAlive = shouldKeepAlive // more requests are pipelined behind this one
      return Reflect.apply(innerWriteHead, this, args as [number])
    }
    attempt(() => replaceKeepAliveSet(this))
    return Reflect.apply(innerWriteHead, this, args.map(withoutKeepAlive) as [number])
  }
  response.writeHead = writeHead
}

function replaceKeepAliveSet(response: http.ServerResponse): void {
  const value = response.getHeader('connection')
  if (!KEEP_ALIVE.test(String(value))) return
  const { getRawHeaderNames }: { getRawHeaderNames?: () => string[] } = Object(response) // untyped
  const names = getRawHeaderNames?.call(response) ?? []
  response.setHeader(
    names.find(isConnection) ?? 'Connection',
    withoutKeepAliveToken(value) as string
  )
}

const KEEP_ALIVE = /keep-alive/i

/** Replaces `Connection: keep-alive` in headers as `writeHead` takes them: an object, names and
 *  values in turn, or pairs of them. */
function withoutKeepAlive(headers: unknown): unknown {
  if (!isObject(headers)) return headers
  if (!Array.isArray(headers)) return withoutKeepAliveIn(headers)
  return headers.map((part: unknown, index) => {
    const isValue = index % 2 === 1
    if (isValue && isConnection(headers[index - 1])) return withoutKeepAliveToken(part)
    return Array.isArray(part) ? withoutKeepAlive(part) : part
  })
}

function withoutKeepAliveIn(headers: Record<string, unknown>): Record<string, unknown> {
  const names = Object.keys(headers).filter(isConnection)
  const replaced = names.map((name) => [name, withoutKeepAliveToken(headers[name])])
  return names.length > 0 ? { ...headers, ...Object.fromEntries(replaced) } : headers
}

function isConnection(name: unknown): boolean {
  return typeof name === 'string' && name.toLowerCase() === 'connection'
}

/** Other names, as in `keep-alive, Upgrade`, stay. */
function withoutKeepAliveToken(value: unknown): unknown {
  if (Array.isArray(value)) return value.map(withoutKeepAliveToken)
  return typeof value === 'string' ? value.replace(KEEP_ALIVE, 'close') : value
}

// Shutdown

interface CheckedShutdownOptions extends Required<DrainOptions> {
  /** They may be an object of the caller's own class, whose methods want it. */
  given: ShutdownOptions
  exitAfterMs: number
}

/** Listens for `SIGTERM` and `SIGINT`; at the first one calls `shutdown(options)`, after which
 *  the process ends, even if something still keeps it alive (which is logged). A second one ends
 *  it at once with 128 + the signal's number. Called again it replaces the options. May come
 *  before or after `start`, and works without a monitor. `stop()` takes the listeners off.
 *  Throws a `TypeError` or `RangeError` for wrong options. */
export function shutdownOnSignal(options: ShutdownOptions = {}): void {
  const checked = toShutdownOptions(options)
  const { signals = ['SIGTERM', 'SIGINT'] } = options
  must(
    Array.isArray(signals) && signals.length > 0 && signals.every((it) => SIGNAL_NUMBERS.has(it)),
    `signals must be some of ${[...SIGNAL_NUMBERS.keys()].join(', ')}`
  )
  takeSignalListenersOff()
  for (const signal of new Set(signals)) {
    const listener: SignalListener = (name, number) => onSignal(name, number, checked)
    signalState.listeners.set(signal, listener)
    process.on(signal, listener)
  }
}

function takeSignalListenersOff(): void {
  for (const [signal, listener] of signalState.listeners) process.off(signal, listener)
  signalState.listeners.clear()
}

function onSignal(
  signal: NodeJS.Signals,
  number: number | undefined,
  options: CheckedShutdownOptions
): void {
  if (signalState.isSignalled) process.exit(128 + (number ?? SIGNAL_NUMBERS.get(signal) ?? 0))
  signalState.isSignalled = true
  void shutDownAndExit(options, signal)
}

/** The signals by which somebody may ask a process to end, with Linux's numbers. */
const SIGNAL_NUMBERS = new Map<string, number>([
  ['SIGHUP', 1],
  ['SIGINT', 2],
  ['SIGQUIT', 3],
  ['SIGUSR1', 10],
  ['SIGUSR2', 12],
  ['SIGTERM', 15],
  ['SIGBREAK', 21]
])

async function shutDownAndExit(
  options: CheckedShutdownOptions,
  signal: NodeJS.Signals
): Promise<void> {
  await beginShutdown(options, signal)
  setTimeout(exitThoughAlive, ALIVE_MS).unref()
}

function exitThoughAlive(): void {
  log('warn', `is done, but something keeps the process alive: ${aliveResources()}; exits`)
  process.exit()
}

/** What keeps the process alive, by kind: `2 TCPSocketWrap, 1 Timeout`. */
function aliveResources(): string {
  const all = process.getActiveResourcesInfo?.() ?? [] // Bun has none
  const others = all.filter((kind) => !STANDARD_STREAM.test(kind))
  const kinds = others.length > 0 ? others : all
  const countByKind = new Map<string, number>()
  for (const kind of kinds) countByKind.set(kind, (countByKind.get(kind) ?? 0) + 1)
  const counts = Array.from(countByKind, ([kind, count]) => `${count} ${kind}`)
  return counts.join(', ') || 'a connection, a timer or the like'
}

const STANDARD_STREAM = /^(Pipe|TTY)Wrap$/ // listed for stdout and stderr, which keep nothing alive

/** Ends what the instance does, in an order in which no request meets a closed database: tells
 *  `onSignal`, drains, closes the server, waits for its requests, calls `cleanUp`, ends upgraded
 *  connections, and stops the monitor. Resolves when all that is done; what takes longer than
 *  `exitAfterMs` is logged, and ends the process with 1. Called twice it is one shutdown. Rejects
 *  with a `TypeError` or `RangeError` for wrong options. */
export async function shutdown(options: ShutdownOptions = {}): Promise<void> {
  await beginShutdown(toShutdownOptions(options))
}

function toShutdownOptions(options: ShutdownOptions): CheckedShutdownOptions {
  must(
    hasOnly(options, SHUTDOWN_OPTIONS),
    `a shutdown takes an object with any of ${SHUTDOWN_OPTIONS.join(', ')}`
  )
  const { reason, fall, timeoutMs } = toDrainOptions(options)
  const { exitAfterMs = timeoutMs + EXIT_MARGIN_MS } = options
  must(mayHaveMethod(options, 'onSignal'), 'onSignal must be a function')
  must(mayHaveMethod(options, 'cleanUp'), 'cleanUp must be a function')
  must(typeof exitAfterMs === 'number', 'exitAfterMs must be a number')
  must(
    exitAfterMs > timeoutMs && exitAfterMs <= TIMER_MAX_MS,
    `exitAfterMs must be greater than timeoutMs, and at most ${TIMER_MAX_MS}`,
    RangeError
  )
  return { given: options, reason, fall, timeoutMs, exitAfterMs }
}

const SHUTDOWN_OPTIONS = [...DRAIN_OPTIONS, 'onSignal', 'cleanUp', 'exitAfterMs', 'signals']

function isShutdownRunning(): boolean {
  return currentShutdown !== undefined && !currentShutdown.isOver
}

function beginShutdown(options: CheckedShutdownOptions, signal?: NodeJS.Signals): Promise<void> {
  if (currentShutdown) return currentShutdown.done
  currentShutdown = new Shutdown()
  currentShutdown.done = performShutdown(currentShutdown, options, signal)
  return currentShutdown.done
}

async function performShutdown(
  shutting: Shutdown,
  options: CheckedShutdownOptions,
  signal: NodeJS.Signals | undefined
): Promise<void> {
  const { app } = state
  const { given, timeoutMs, exitAfterMs } = options
  const cutAtMs = performance.now() + timeoutMs
  // The one timer that keeps the process alive: else that might end before cleanUp was called.
  const deadline = setTimeout(() => exitUndone(shutting, exitAfterMs), exitAfterMs)

  const told = doPart(shutting, 'onSignal', () => given.onSignal?.({ signal }))
  await doPart(shutting, 'draining', () => drainForShutdown(options))
  await doPart(shutting, 'the requests in flight', () => closeServer(app, cutAtMs, timeoutMs))
  const cleaned = doPart(shutting, 'cleanUp', () => given.cleanUp?.({ signal }))
  await doPart(shutting, 'upgraded connections', () => endUpgraded(app))
  await Promise.all([told, cleaned])
  await doPart(shutting, 'the monitor', stop)

  clearTimeout(deadline)
  app.restoreClose()
  app.unhook()
  shutting.isOver = true
}

async function drainForShutdown(options: Required<DrainOptions>): Promise<void> {
  const outcome = await untilDrained(options)
  if (outcome.startsWith('Not drained after')) log('warn', outcome)
}

/** What fails is logged, and makes the exit status 1; the other parts are done all the same. */
async function doPart(shutting: Shutdown, name: string, part: () => unknown): Promise<void> {
  shutting.undone.add(name)
  try {
    await part()
  } catch (error) {
    if (!isServerClosed(error)) {
      log('error', `failed to shut down: ${name}: ${errorText(error)}`, ...framesOf(error))
      process.exitCode ||= 1
    }
  }
  shutting.undone.delete(name)
}

/** What a `close` says that was bound before the shutdown: we have closed the server already. */
function isServerClosed(error: unknown): boolean {
  return attempt(() => (error as NodeJS.ErrnoException).code) === 'ERR_SERVER_NOT_RUNNING'
}

function exitUndone({ undone }: Shutdown, afterMs: number): void {
  log('error', `exits after ${afterMs / 1_000} s; not done: ${[...undone].join(', ')}`)
  process.exit(1)
}

/** Closes the server and its connections, each as soon as no request is in flight on it. */
async function closeServer(app: Application, cutAtMs: number, timeoutMs: number): Promise<void> {
  const { server, http2Sessions } = app
  if (!server) return

  app.isClosing = true
  sendClientsElsewhere(app)
  app.restoreClose = letOthersClose(server)
  attempt(() => server.close()) // it may be closed, or never have listened
  for (const session of http2Sessions) attempt(() => session.close())
  do {
    closeConnections(server, 'closeIdleConnections')
    await pollingPause() // also for a connection whose answer has just been sent
    forgetDeadRequests(app)
  } while (isServing(app) && performance.now() < cutAtMs)

  if (isServing(app)) await cutRequests(app, timeoutMs)
  closeConnections(server, 'closeAllConnections')
  if (app.upgraded.size === 0) destroyAll(app.connections)
}

async function cutRequests(
  { inFlight, http2Sessions }: Application,
  afterMs: number
): Promise<void> {
  const count = inFlight.size || http2Sessions.size // of streams no request may tell
  log('warn', `cuts ${count} requests that are still in flight after ${afterMs / 1_000} s`)
  for (const [response, { socket }] of inFlight) abortRequest(response, socket)
  for (const session of http2Sessions) attempt(() => session.destroy())
  await pollingPause() // for the application to hear of it before cleanUp
}

/** Whoever closes the server as well, in `cleanUp` say, hears when it has closed, and not that
 *  it runs no more. Gives what takes this back. */
function letOthersClose(server: net.Server): () => void {
  const ownClose = Object.getOwnPropertyDescriptor(server, 'close')
  // oxlint-disable-next-line typescript/unbound-method -- it is applied to the server below
  const innerClose = server.close
  let isClosed = false
  server.once('close', () => {
    isClosed = true
  })
  server.close = (callback) => {
    if (callback && isClosed) setImmediate(() => callback())
    else if (callback) server.once('close', () => callback())
    return isClosed ? server : Reflect.apply(innerClose, server, [])
  }
  return () => {
    Reflect.deleteProperty(server, 'close')
    if (ownClose) Reflect.defineProperty(server, 'close', ownClose)
  }
}

/** An HTTP/2 server may serve streams, of which no request tells. */
function isServing({ inFlight, http2Sessions }: Application): boolean {
  return inFlight.size > 0 || [...http2Sessions].some(({ destroyed }) => !destroyed)
}

function destroyAll(sockets: Set<net.Socket>): void {
  for (const socket of sockets) attempt(() => socket.destroy())
}

/** Node.js 20's closeIdleConnections leaves those that never sent a request, and an http2 server
 *  has neither method. */
function closeConnections(
  server: net.Server,
  method: 'closeIdleConnections' | 'closeAllConnections'
): void {
  attempt(() => (server as { [name in typeof method]?: () => void })[method]?.())
}

function abortRequest(response: http.ServerResponse, socket: net.Socket): void {
  attempt(() => {
    const { stream } = response as { stream?: { session?: Http2Session; destroy(): void } }
    if (stream?.session) stream.destroy()
    else socket.destroy()
  })
}

/** Fastify's and Nest's close() wait for upgraded connections, and would wait for ever. */
async function endUpgraded({ upgraded, connections }: Application): Promise<void> {
  await untilNoneOrAfter(upgraded, GOODBYE_MS)
  for (const socket of upgraded) attempt(() => socket.end())
  await untilNoneOrAfter(upgraded, GOODBYE_MS)
  destroyAll(upgraded)
  destroyAll(connections)
}

async function untilNoneOrAfter(all: Set<unknown>, limitMs: number): Promise<void> {
  const startedAtMs = performance.now()
  while (all.size > 0 && performance.now() - startedAtMs < limitMs) await pollingPause()
}

// --- The command table ---------------------------------------------------------------------------

/** Whoever sent a line or a request. */
interface Asker extends Connection {
  /** Over HTTP a command has to be offered there. */
  readonly isHttp: boolean
  /** Whether a person sits there, in interactive mode or at a browser; else it is a program. */
  readonly isPerson: boolean
  /** Writes what went wrong, with a status for HTTP. */
  refuse(text: string, code: number): void
}

type Answer = Mode | void | Promise<Mode | void>

interface Entry {
  doc: string
  http: boolean
  local: boolean
  /** Whether `help` leaves it out. */
  hidden: boolean
  /** The media type of what it writes. */
  type: string
  run(asker: Asker, args: string[]): Answer
  /** When a failure of it was logged last. */
  loggedAtMs: number
}

const PLAIN_TEXT = 'text/plain; charset=utf-8'
const JSON_TEXT = 'application/json'
const PROMETHEUS_TEXT = 'text/plain; version=0.0.4; charset=utf-8'

/** Adds a command, or replaces it. The first line of `doc` is what `help` lists. Throws a
 *  `TypeError` for a name that is empty or has white space in it, and for wrong options. */
export function register(
  name: string,
  doc: string,
  command: Command,
  options: CommandOptions = {}
): void {
  const isKnown: boolean = hasOnly(options, ['http', 'local'])
  must(isKnown, 'the options of a command are http and local')
  const { http: overHttp = false, local = false } = options
  must(isWord(name), 'a command has a name without white space')
  must(
    [overHttp, local].every((each) => typeof each === 'boolean'),
    'http and local are booleans'
  )
  must(typeof doc === 'string' && typeof command === 'function', 'doc is text, command a function')
  must(
    !overHttp || !local,
    'a command is http or local: a browser here is local to all pages it shows'
  )
  addEntry(name, {
    doc,
    http: overHttp,
    local,
    type: commands.get(name)?.type ?? PLAIN_TEXT, // a replaced `metrics` is still for Prometheus
    run: (asker, args) => goOnWith(command(asker, ...args), (mode) => checkedMode(name, mode))
  })
}

/** Adds a command of ours that writes its reply, and leaves the mode as it is. */
function addCommand(
  name: string,
  doc: string,
  write: (asker: Asker, ...args: string[]) => void | Promise<void>,
  how: Partial<Entry> = {}
): void {
  addEntry(name, { doc, run: (asker, args) => write(asker, ...args), ...how })
}

/** Adds a command of ours that gives the text of its reply, without the last line feed. */
function addReport(
  name: string,
  doc: string,
  report: (asker: Asker, ...args: string[]) => string | Promise<string>,
  how: Partial<Entry> & { mode?: Mode } = {}
): void {
  const { mode, ...options } = how
  const write = (asker: Asker, text: string): Mode | void => {
    asker.write(`${text}\n`)
    return mode
  }
  const run = (asker: Asker, args: string[]): Answer =>
    goOnWith(report(asker, ...args), (text) => write(asker, text))
  addEntry(name, { doc, run, ...options })
}

function addEntry(name: string, entry: Partial<Entry> & Pick<Entry, 'doc' | 'run'>): void {
  commands.set(name, {
    http: true,
    local: false,
    hidden: false,
    type: PLAIN_TEXT,
    loggedAtMs: -Infinity,
    ...entry
  })
}

/** Goes on with a value at once if it is no promise. */
function goOnWith<T, R>(value: T | Promise<T>, next: (value: T) => R): R | Promise<R> {
  if (!isObject(value)) return next(value as T)
  return Promise.resolve<T>(value).then(next)
}

const MODES: unknown[] = ['quit', 'interactive', 'more', undefined]

function checkedMode(name: string, answer: unknown): Mode | void {
  if (MODES.includes(answer)) return answer as Mode | void
  failWith(`${name} returned ${errorText(answer)} instead of a mode; reply with connection.write`)
}

/** Runs a command, for lines and HTTP alike; whatever goes wrong becomes a line for the asker. */
function runCommand(name: string, args: string[], asker: Asker): Answer {
  const entry = commands.get(name)
  if (!entry || (asker.isHttp && !entry.http)) return refuseUnknown(name, asker)
  if (entry.local && !asker.local) {
    return asker.refuse(`${name} is for this machine only\n`, 403)
  }
  try {
    const answer = entry.run(asker, args)
    if (!(answer instanceof Promise)) return answer
    return answer.catch((error: unknown) => refuseFailed(name, entry, error, asker))
  } catch (error) {
    return refuseFailed(name, entry, error, asker)
  }
}

function refuseUnknown(name: string, asker: Asker): void {
  asker.refuse(`${toRedLine(`Invalid command '${name}'`)}\nTry "help".\n`, 404)
}

/** The asker gets one line; the frames, which tell of the host's files, go to the log. */
function refuseFailed(name: string, entry: Entry, error: unknown, asker: Asker): void {
  if (isRefusal(error)) {
    asker.refuse(`${toRedLine(error.message)}\n`, 500)
    return
  }
  const line = `${kindOf(error)}: ${errorText(error)}`
  asker.refuse(`${toRedLine(line)}\n`, 500)

  const nowMs = performance.now()
  if (nowMs - entry.loggedAtMs < LOG_MS) return
  entry.loggedAtMs = nowMs
  log('error', `got ${line} from ${name}`, ...framesOf(error))
}

function kindOf(error: unknown): string {
  const name: unknown = attempt(() => error instanceof Error && error.name)
  return typeof name === 'string' && name !== '' ? name : 'Error'
}

// --- Commands ------------------------------------------------------------------------------------

addCommand(
  'help',
  `Get help about server commands

    help lists the commands, help NAME shows what is written about one.
`,
  (asker, name) => {
    if (name === undefined) asker.write(`${listOfCommands()}\n`)
    else tellAbout(name, asker)
  }
)

function listOfCommands(): string {
  const shown = [...commands].filter(([, { hidden }]) => !hidden)
  const lines = shown.map(([name, { doc }]) => `  ${name} -- ${summaryOf(doc)}`)
  return ['Supported commands:', ...lines.sort()].join('\n')
}

function summaryOf(doc: string): string {
  const [summary] = doc.split('\n')
  return summary || '?'
}

function tellAbout(name: string, asker: Asker): void {
  const entry = commands.get(name)
  if (entry) asker.write(`Help for ${name}:\n\n${entry.doc || '?'}\n`)
  else refuseUnknown(name, asker)
}

addReport(
  'interactive',
  `Turn on monitor's interactive mode

    interactive keeps the connection open for further commands, until quit. An empty line repeats
    the last command.
`,
  () => 'Interactive mode on.  Use "quit" To exit.',
  { http: false, mode: 'interactive' }
)

addReport(
  'quit',
  `Quit the monitor

    quit closes the connection. Outside of interactive mode each command does so after its reply.
`,
  () => 'Goodbye.',
  { http: false, mode: 'quit' }
)

addCommand(
  'health_check',
  'Check whether the instance is alive and ready to serve requests.',
  checkHealth
)

addCommand('readyz', 'Answer as health_check does, under the name of Kubernetes', checkHealth, {
  hidden: true
})

addReport('livez', 'Prove that the event loop turns', () => 'Alive', { hidden: true })

/** Awaits nothing if there is nothing to be asked. */
function checkHealth(asker: Asker): void | Promise<void> {
  noteProber(asker, 1)
  const inspection = inspect()
  if (!inspection) return tellVerdict(asker)
  return inspection.then(() => tellVerdict(asker))
}

function tellVerdict(asker: Asker): void {
  const reason = verdict()
  if (reason === 'OK') asker.write('OK\n')
  else asker.refuse(`${reason}\n`, 503)
}

addReport('agent_check', "Answer HAProxy's agent check", async (asker) => {
  noteProber(asker, Infinity) // one answer is enough for an agent
  await inspect()
  const reason = verdict()
  if (reason === 'OK') return `up ${idlePercentage()}%`
  return `${state.draining ? 'stopped' : 'down'} #${reason}`
})

/** What the event loop has left over, but never nothing: an instance that fails fast is idle
 *  too. */
function idlePercentage(): number {
  const idle = Math.round(100 - 100 * Math.max(0, state.load.utilization))
  return Math.max(10, idle)
}

addReport('warmup_state', 'Get instance warmup state.', () => {
  const stage = warmupStage()
  if (stage === 'running') return '0 1'
  return stage === 'done' ? '1 0' : '0 0'
})

addReport(
  'drain',
  'Take the instance out: drain [REASON...]',
  (asker, ...words) => {
    const options = words.length > 0 ? { reason: words.join(' ') } : {}
    return untilDrained(options, (progress) => asker.write(`${progress}\n`))
  },
  { http: false, local: true }
)

addReport(
  'resume',
  'Take the instance into service again',
  () => {
    if (currentShutdown) failWith('Error: not resumed, since the instance is shutting down')
    resume()
    return 'Resumed'
  },
  { http: false, local: true }
)

// --- Figures, metrics and status -----------------------------------------------------------------

/** Gives the database that is meant; `-` and nothing mean `main`, else the first one. */
function databaseNamed(name = '-'): RegisteredDatabase {
  if (name === '-' && !databases.has(name)) return mainDatabase()
  return databases.get(name) ?? failWith(`Error: no database '${name}' is registered`)
}

function mainDatabase(): RegisteredDatabase {
  const [first] = databases.values()
  return databases.get('main') ?? first ?? failWith("Error: no database 'main' is registered")
}

function toNumber(text: string, name: string, max: number): number {
  const number = Number(text)
  if (DECIMAL.test(text) && number <= max) return number
  return failWith(`Error: ${name} must be a number from 0 to ${max}`)
}

const DECIMAL = /^\d+(\.\d+)?$/ // 0.5

/** Gives what was counted in the last seconds. */
function countsOf(
  { counters }: RegisteredDatabase,
  seconds: number
): Record<keyof Activity, number> {
  return {
    loads: counters.loads.last(seconds),
    stores: counters.stores.last(seconds),
    connections: counters.connections.last(seconds)
  }
}

/** Gives a database's own figures, -1 for each that it leaves out. */
async function figuresOf(
  registered: RegisteredDatabase | undefined
): Promise<(name: keyof Figures) => number> {
  const figures: unknown = await registered?.figures?.ask()
  return (name) => {
    const value = isObject(figures) ? figures[name] : undefined
    return typeof value === 'number' && Number.isFinite(value) ? Math.trunc(value) : -1
  }
}

addReport(
  'dbinfo',
  `Get database statistics

    dbinfo [DATABASE] [SECONDS=300]: loads, stores and connections in the last SECONDS, objects in
    the caches, and those of them that are loaded. "-" is the main database.
`,
  async (_, name, seconds = '300') => {
    const registered = databaseNamed(name)
    const counts = countsOf(registered, toNumber(seconds, 'SECONDS', HISTORY_SECONDS))
    const figure = await figuresOf(registered)
    const { loads, stores, connections } = counts
    return [loads, stores, connections, figure('size'), figure('nonGhost')].join(' ')
  }
)

addReport(
  'zeocache',
  `Get ZEO client cache statistics

    zeocache [DATABASE]: records added, bytes added, records evicted, bytes evicted, accesses.
`,
  async (_, name) => {
    const figure = await figuresOf(databaseNamed(name))
    const added = [figure('recordsAdded'), figure('bytesAdded')]
    const evicted = [figure('recordsEvicted'), figure('bytesEvicted')]
    return [...added, ...evicted, figure('accesses')].join(' ')
  }
)

addReport('zeostatus', 'Get ZEO client status information', async (_, name) => {
  const trouble = await inspectDatabase(databaseNamed(name))
  return trouble === '' ? 'True' : 'False'
})

addReport(
  'monitor',
  `Get general process info

    monitor [AGE=100] [DATABASE]: how many requests are in flight, or connections of a database are
    open; the memory; and, on this machine, those that are older than AGE seconds (0: all).
`,
  async (asker, age = '100', name) => {
    const least = toNumber(age, 'AGE', Number.MAX_SAFE_INTEGER)
    const open = name === undefined ? openRequests() : await openConnections(databaseNamed(name))
    const kilobytes = Math.round(process.memoryUsage.rss() / 1_024)
    const head = [`${open?.length ?? -1}`, `VmRSS:\t${String(kilobytes).padStart(8)} kB`]
    if (!asker.local || !open) return head.join('\n')

    const old = open.filter(({ seconds }) => least === 0 || seconds > least)
    old.sort((one, other) => one.seconds - other.seconds)
    const lines = old.map(({ seconds, info }) => `${seconds.toFixed(1)} ${clean(info)}`)
    return [...head, ...lines].join('\n')
  }
)

interface Open {
  seconds: number
  info: string
}

/** The requests in flight, without their query strings, which carry secrets. */
function openRequests(): Open[] | undefined {
  if (!state.app.server) return undefined
  return Array.from(state.app.inFlight.values(), ({ startedAtMs, line }) => ({
    seconds: (performance.now() - startedAtMs) / 1_000,
    info: line.replace(/\?.*/s, '')
  }))
}

async function openConnections(registered: RegisteredDatabase): Promise<Open[] | undefined> {
  const open = await registered.connections?.ask()
  if (!Array.isArray(open)) return undefined
  return open.map((connection: unknown) => {
    const { openedAt, info } = Object(connection) as OpenConnection
    const seconds = (Date.now() - Number(openedAt)) / 1_000 || 0
    // The wall clock may have been set back.
    return { seconds: Math.max(0, seconds), info: errorText(info) }
  })
}

/** Not every version of Node.js's types has it on `performance`. */
type MeasureLoad = (now?: object, before?: object) => { active: number; utilization: number }

/** Measured once a tick, so that probers get the same answer and none spoils another's. */
function measureLoad({ load, app }: State): void {
  measureUtilization(load)

  const nowMs = performance.now()
  load.lagMs = Math.max(load.lagMs, nowMs - load.tickedAtMs - TICK_MS)
  load.tickedAtMs = nowMs
  load.ticks++
  if (load.ticks % TICKS_PER_SECOND > 0) return

  const requests = app.requests - load.requestsBefore
  const second = { utilization: load.utilization, requests, lagMs: load.lagMs }
  load.seconds = [...load.seconds.slice(1 - CHART_SECONDS), second]
  load.requestsBefore = app.requests
  load.lagMs = 0
}

function measureUtilization(load: Load): void {
  const { eventLoopUtilization }: { eventLoopUtilization?: MeasureLoad } = Object(performance)
  const now = eventLoopUtilization?.()
  if (!now?.active) return // it is missing on Bun, and always 0 on Deno
  load.samples = [...load.samples.slice(-LOAD_SAMPLES), now]
  load.utilization = eventLoopUtilization?.(now, load.samples[0]).utilization || 0
}

/** The largest delay of our tick lately. */
function lagSeconds({ load }: State): number {
  const lately = load.seconds.slice(-LAG_SECONDS).map(({ lagMs }) => lagMs)
  return Math.max(load.lagMs, ...lately) / 1_000
}

/** Without a server given, nothing is known of requests. */
function httpFigures(): { in_flight: number; requests: number; errors: number } {
  const { server, inFlight, requests, errors } = state.app
  if (!server) return { in_flight: -1, requests: -1, errors: -1 }
  return { in_flight: inFlight.size, requests, errors }
}

addReport(
  'perf_metrics',
  `Get performance related metrics

    perf_metrics [DATABASE] [SECONDS=300]: one line of JSON, with -1 for what cannot be had.
`,
  async (_, name = '-', seconds = '300') => {
    const registered = databases.size > 0 || name !== '-' ? databaseNamed(name) : undefined
    const span = toNumber(seconds, 'SECONDS', HISTORY_SECONDS)
    if (registered && (await inspectDatabase(registered))) {
      return JSON.stringify({ error: toRedLine(describeTrouble(registered)) })
    }

    return JSON.stringify({
      instance: {
        uptime: Math.floor(process.uptime()),
        pid: process.pid
      },
      ...(await databaseFigures(registered, span)),
      memory: memoryFigures(),
      cpu: process.cpuUsage(),
      loop: { utilization: Number(state.load.utilization.toFixed(4)) },
      http: httpFigures()
    })
  },
  { type: JSON_TEXT }
)

/** Under the names that ftw.monitor gives them. */
async function databaseFigures(
  registered: RegisteredDatabase | undefined,
  seconds: number
): Promise<{ cache: object; db: object }> {
  const counts = registered && countsOf(registered, seconds)
  const figure = await figuresOf(registered)
  return {
    cache: { size: figure('size'), ngsize: figure('nonGhost'), max_size: figure('maxSize') },
    db: {
      loads: counts?.loads ?? -1,
      stores: counts?.stores ?? -1,
      connections: counts?.connections ?? -1,
      conflicts: figure('conflicts'),
      unresolved_conflicts: figure('unresolvedConflicts'),
      total_objs: figure('objects'),
      size_in_bytes: figure('bytes')
    }
  }
}

/** In bytes. What is -1 cannot be read with the modules that this file restricts itself to. */
function memoryFigures(): object {
  const { rss, heapUsed, heapTotal, external, arrayBuffers } = process.memoryUsage()
  return {
    rss,
    uss: -1,
    pss: -1,
    heap_used: heapUsed,
    heap_total: heapTotal,
    external,
    array_buffers: arrayBuffers
  }
}

/** Metrics of one name, in the text format of Prometheus. */
interface Family {
  name: string
  help: string
  /** By their labels, as `{database="main"}`; '' for none. What is less than 0 is not known. */
  values: Map<string, number>
}

addReport(
  'metrics',
  'Get metrics for Prometheus, in its text exposition format',
  async () => {
    await inspectAll()
    const collected = await collectAll()
    const families = [...processFamilies(), ...instanceFamilies(), ...databaseFamilies()]
    const ours = families.filter(({ name }) => !collected.has(name))
    return [...ours.flatMap(linesOfFamily), ...[...collected.values()].flat()].join('\n')
  },
  { type: PROMETHEUS_TEXT }
)

/** A function of the service's that gives metrics in Prometheus's text format. */
interface Collector {
  call: SharedCall
  /** A failure is logged once, until it works again. */
  isFailing: boolean
}

/** Adds what the service has to say to `metrics`: `registerMetrics(() =>
 *  client.register.metrics())` of prom-client, say. `collect` gives Prometheus's text format, or
 *  a promise of it, within 5 s. A family that it gives replaces ours of that name. What fails
 *  costs its own part, and one line in the log. Throws a `TypeError` for what is no function. */
export function registerMetrics(collect: () => string | Promise<string>): void {
  must(typeof collect === 'function', 'registerMetrics takes a function that gives text')
  collectors.push({ call: new SharedCall(collect, COLLECTOR_MS), isFailing: false })
}

/** Gives the lines of each family; of two collectors that give the same one the first counts. */
async function collectAll(): Promise<Map<string, string[]>> {
  const parts = await Promise.all(collectors.map(collectFrom))
  const all = new Map<string, string[]>()
  for (const [name, lines] of parts.flatMap((families) => [...families])) {
    if (!all.has(name)) all.set(name, lines)
  }
  return all
}

async function collectFrom(collector: Collector): Promise<Map<string, string[]>> {
  try {
    const families = familiesIn(await collector.call.ask())
    collector.isFailing = false
    return families
  } catch (error) {
    if (!collector.isFailing) log('warn', `leaves metrics out: ${errorText(error)}`)
    collector.isFailing = true
    return new Map()
  }
}

/** Takes a text apart into the lines of each family. A line that Prometheus cannot read would
 *  cost it all metrics. */
function familiesIn(text: unknown): Map<string, string[]> {
  if (typeof text !== 'string') return failWith('what registerMetrics was given gave no text')
  const families = new Map<string, string[]>()
  let current = ''
  for (const line of text.split(/\r?\n/)) {
    if (METRICS_COMMENT.test(line)) continue
    const [, described] = FAMILY_LINE.exec(line) ?? []
    const [, sample = ''] = SAMPLE_LINE.exec(line) ?? []
    const name = described ?? sample
    if (name === '') failWith(`no line of Prometheus's text format: ${line.slice(0, 100)}`)
    if (described !== undefined || !isSampleOf(current, sample)) current = name
    const lines = families.get(current)
    if (lines) lines.push(line)
    else families.set(current, [line])
  }
  return families
}

/** A blank line, or a comment; but `# EOF` and `# UNIT` are of OpenMetrics, another format. */
const METRICS_COMMENT = /^\s*(?:$|#(?! (?:HELP|TYPE|EOF|UNIT)\b))/

const FAMILY_LINE = /^# (?:HELP|TYPE) ([\w:]+)/ // # TYPE size gauge

/** `size{unit="B"} 7`, perhaps with a time after it */
const SAMPLE_LINE =
  /^([\w:]+)(?:\{(?:[^"}]|"(?:\\.|[^"\\])*")*\})?\s+[-+]?(?:\.?\d|inf|nan)\S*(?:\s+-?\d+)?\s*$/i

/** A histogram has samples of further names. */
function isSampleOf(name: string, sample: string): boolean {
  if (sample === name) return true
  return sample.startsWith(`${name}_`) && /_(bucket|sum|count|created|total)$/.test(sample)
}

function linesOfFamily({ name, help, values }: Family): string[] {
  const known = [...values].filter(([, value]) => value >= 0)
  if (known.length === 0) return []
  const type = name.endsWith('_total') ? 'counter' : 'gauge'
  const lines = known.map(([labels, value]) => `${name}${labels} ${value}`)
  return [`# HELP ${name} ${help}`, `# TYPE ${name} ${type}`, ...lines]
}

function family(name: string, help: string, value: number, labels = ''): Family {
  return { name, help, values: new Map([[labels, value]]) }
}

/** Under the names that Prometheus's clients have made customary. */
function processFamilies(): Family[] {
  const { user, system } = process.cpuUsage()
  const { rss, heapUsed, heapTotal, external } = process.memoryUsage()
  const { utilization } = state.load
  const version = `{version="${process.version}"}`
  return [
    family('process_cpu_user_seconds_total', 'CPU time in user mode.', user / 1e6),
    family('process_cpu_system_seconds_total', 'CPU time in the kernel.', system / 1e6),
    family('process_cpu_seconds_total', 'CPU time.', (user + system) / 1e6),
    family('process_start_time_seconds', 'Start, since 1970.', performance.timeOrigin / 1e3),
    family('process_resident_memory_bytes', 'Resident memory.', rss),
    family('nodejs_heap_size_total_bytes', 'Size of the heap.', heapTotal),
    family('nodejs_heap_size_used_bytes', 'Used part of the heap.', heapUsed),
    family('nodejs_external_memory_bytes', 'Memory outside the heap.', external),
    family('nodejs_eventloop_utilization', 'Busy part of the last ten seconds.', utilization),
    family('nodejs_version_info', 'Version of Node.js.', 1, version)
  ]
}

const LAG_HELP = 'The largest delay of a timer in the last thirty seconds.'

function instanceFamilies(): Family[] {
  const isHealthy = Number(verdict() === 'OK')
  const isWarm = Number(state.warmup.outcome === 'done')
  const { requests, in_flight, errors } = httpFigures()
  const upgraded = state.app.server ? state.app.upgraded.size : -1
  return [
    family('ftw_monitor_healthy', 'Whether it may be sent requests.', isHealthy),
    family('ftw_monitor_warmup_done', 'Whether it is warm.', isWarm),
    family('ftw_monitor_http_requests_total', 'Requests so far.', requests),
    family('ftw_monitor_http_requests_in_flight', 'Requests in flight.', in_flight),
    family('ftw_monitor_http_errors_total', 'Answers of 500 and more.', errors),
    family('ftw_monitor_upgraded_connections', 'Connections of WebSockets, say.', upgraded),
    family('ftw_monitor_eventloop_lag_seconds', LAG_HELP, lagSeconds(state))
  ]
}

function databaseFamilies(): Family[] {
  const ofEach = (
    name: string,
    help: string,
    value: (of: RegisteredDatabase) => number
  ): Family => {
    const all = Array.from(databases.values(), (each): [string, number] => [
      `{database=${JSON.stringify(each.name)}}`,
      value(each)
    ])
    return { name: `ftw_monitor_database_${name}`, help, values: new Map(all) }
  }
  const counted = (kind: keyof Activity): Family =>
    ofEach(`${kind}_total`, `What the service counted as ${kind}.`, (of) => of.counters[kind].total)

  const isConnected = ({ trouble }: RegisteredDatabase): number => Number(trouble === '')
  return [
    ofEach('connected', 'Whether it is connected.', isConnected),
    counted('loads'),
    counted('stores'),
    counted('connections')
  ]
}

// Status

/** Tells how the instance is, at one look. Answers within a second, and never rejects. */
export async function status(): Promise<Status> {
  await inspectAll()
  const { app, load, instance } = state
  const reason = verdict()
  return {
    healthy: reason === 'OK',
    reason,
    url: instance?.url ?? '',
    uptimeSeconds: process.uptime(),
    requestsInFlight: app.server ? app.inFlight.size : -1,
    upgradedConnections: app.server ? app.upgraded.size : -1,
    eventLoopUtilization: load.utilization,
    residentMemoryBytes: process.memoryUsage.rss(),
    warmup: allSites().map(siteStatus),
    databases: Array.from(databases.values(), databaseStatus),
    probers: recentProbers(),
    draining: state.draining && drainingStatus(state.draining)
  }
}

function siteStatus(site: string): SiteStatus {
  const { sites, outcome, runningSinceMs } = state.warmup
  const known = sites.get(site)
  if (!known) {
    return { site, status: outcome === 'off' ? 'off' : 'waiting', seconds: 0, failure: '' }
  }
  if (known.status !== 'running') return known
  return { ...known, seconds: (performance.now() - runningSinceMs) / 1_000 }
}

function databaseStatus(registered: RegisteredDatabase): DatabaseStatus {
  const { name, isOptional, trouble, isConnected } = registered
  const connected = trouble === ''
  return { name, optional: isOptional, connected, trouble, answeredMs: isConnected.answeredMs }
}

/** The latest first, and none that has been silent for an hour. */
function recentProbers(): ProberStatus[] {
  const all = Array.from(state.probers.known, ([address, prober]) => proberStatus(address, prober))
  const recent = all.filter(({ askedSecondsAgo }) => askedSecondsAgo <= HISTORY_SECONDS)
  return recent.sort((one, other) => one.askedSecondsAgo - other.askedSecondsAgo)
}

function proberStatus(address: string, { lastAskedAtMs, intervalMs }: Prober): ProberStatus {
  const askedSecondsAgo = (state.clock.nowMs - lastAskedAtMs) / 1_000
  const ipv4 = address.replace(/^::ffff:(?=[\d.]+$)/, '') // as :: names clients of IPv4
  return {
    address: ipv4,
    askedSecondsAgo,
    intervalSeconds: intervalMs < 0 ? -1 : intervalMs / 1_000
  }
}

function drainingStatus(draining: Draining): DrainingStatus {
  return {
    seconds: (performance.now() - draining.sinceMs) / 1_000,
    probers: draining.waitFor.length,
    probersInformed: countInformed(draining)
  }
}

/** What tells of others, the addresses of probers and the texts of errors, is for this machine
 *  only. */
async function statusFor(asker: Asker): Promise<Status> {
  const known = await status()
  if (asker.local) return known
  return {
    ...known,
    reason: known.reason.replace(/ failed: .*/s, ' failed'),
    databases: known.databases.map((each) => ({
      ...each,
      trouble: each.trouble.split(':')[0] ?? ''
    })),
    probers: known.probers.map((each) => ({ ...each, address: 'a prober' })),
    warmup: known.warmup.map((each) => ({ ...each, failure: '' }))
  }
}

/** Not even the name of a site may make HAProxy's `expect string OK` green. */
function withoutOkUnlessHealthy(text: string, { healthy }: Status): string {
  return healthy ? text : text.replaceAll('OK', 'O K')
}

addCommand(
  'status',
  `Show how the instance is

    status: the verdict, and what it comes from. Over HTTP it is JSON, in the shape of
    application/health+json.
`,
  async (asker) => {
    const known = await statusFor(asker)
    if (asker instanceof Exchange)
      asker.reply(renderJson(known), known.healthy ? 200 : 503, HEALTH_JSON)
    else asker.write(renderText(known))
  }
)

type Grade = 'pass' | 'warn' | 'fail'

/** One thing that the status tells of: a line for people, a check of the JSON, a row of the
 *  page. */
interface Row {
  kind: 'instance' | 'warm-up' | 'database' | 'prober' | 'draining'
  name: string
  text: string
  grade: Grade
  /** What is measured, in the words of the JSON, with its unit. */
  measure: string
  value: number
  unit: string
  /** For a bar, from 0 to 1; -1 for one that moves without an end in sight. */
  progress?: number
}

function rowsOf(known: Status): Row[] {
  return [
    instanceRow(known),
    ...known.warmup.map(siteRow),
    ...known.databases.map(databaseRow),
    ...known.probers.map(proberRow),
    drainingRow(known)
  ]
}

function instanceRow(known: Status): Row {
  const { url, uptimeSeconds, requestsInFlight, upgradedConnections } = known
  const { eventLoopUtilization, residentMemoryBytes } = known
  const parts = [url || 'not found yet', `up ${duration(uptimeSeconds)}`]
  if (requestsInFlight >= 0) {
    parts.push(`${requestsInFlight} requests in flight`, `${upgradedConnections} upgraded`)
  }
  if (eventLoopUtilization >= 0) parts.push(`loop ${percentage(eventLoopUtilization)} % busy`)
  parts.push(`${Math.round(residentMemoryBytes / 2 ** 20)} MiB`)
  return { ...measured('uptime', uptimeSeconds, 's'), text: parts.join(', ') }
}

function measured(measure: string, value: number, unit: string): Row {
  return { kind: 'instance', name: '', text: '', grade: 'pass', measure, value, unit }
}

function siteRow({ site, status: stage, seconds, failure }: SiteStatus): Row {
  const time = `${seconds.toFixed(1)} s`
  const grade: Grade = stage === 'warm' || stage === 'off' ? 'pass' : 'fail'
  const measure = { measure: 'warmup:duration', value: seconds, unit: 's', grade }
  const row = { kind: 'warm-up', name: site, ...measure } as const
  switch (stage) {
    case 'warm':
      return { ...row, text: `warm after ${time}`, progress: 1 }
    case 'running':
      return { ...row, text: `running for ${time}`, progress: -1 }
    case 'failed':
      return { ...row, text: `failed after ${time}${failure && `: ${failure}`}`, progress: 0 }
    case 'waiting':
      return { ...row, text: 'waiting', progress: 0 }
    case 'off':
      return { ...row, text: 'off' }
  }
}

function databaseRow({ name, optional, connected, trouble, answeredMs }: DatabaseStatus): Row {
  const answered = `connected, answered in ${Math.round(answeredMs)} ms`
  const stateText = connected ? answered : trouble
  const text = optional ? `${stateText} (optional)` : stateText
  const broken: Grade = optional ? 'warn' : 'fail'
  const measure = { measure: 'database:responseTime', value: answeredMs, unit: 'ms' }
  return { kind: 'database', name, text, grade: connected ? 'pass' : broken, ...measure }
}

function proberRow({ address, askedSecondsAgo, intervalSeconds }: ProberStatus): Row {
  const asked = `asked ${askedSecondsAgo.toFixed(1)} s ago`
  const text = intervalSeconds >= 0 ? `${asked}, every ${intervalSeconds.toFixed(1)} s` : asked
  const measure = { measure: 'prober:interval', value: intervalSeconds, unit: 's' }
  return { kind: 'prober', name: address, text, grade: 'pass', ...measure }
}

function drainingRow({ draining, requestsInFlight }: Status): Row {
  const row = { kind: 'draining', name: '', measure: 'draining:duration', unit: 's' } as const
  if (!draining) return { ...row, text: 'no', grade: 'pass', value: 0 }

  const { seconds, probers, probersInformed } = draining
  const inFlight = requestsInFlight >= 0 ? `, ${requestsInFlight} requests in flight` : ''
  const known = `${probersInformed} of ${probers} probers know`
  const text = `for ${seconds.toFixed(1)} s, ${known}${inFlight}`
  const progress = probers > 0 ? probersInformed / probers : 1
  return { ...row, text, grade: 'fail', value: seconds, progress }
}

/** In the unit of which there are at least two. */
function duration(seconds: number): string {
  if (seconds < 120) return `${Math.floor(seconds)} s`
  if (seconds < 7_200) return `${Math.floor(seconds / 60)} min`
  if (seconds < 172_800) return `${Math.floor(seconds / 3_600)} h`
  return `${Math.floor(seconds / 86_400)} days`
}

function percentage(share: number): number {
  return Math.round(share * 100)
}

/** For people; the first line is the verdict's reason and nothing else. */
function renderText(known: Status): string {
  const rows = rowsOf(known)
  const nameWidth = Math.max(...rows.map(({ name }) => name.length)) + 3
  const lines = rows.map(({ kind, name, text }) => {
    const title = kind.padEnd(STATUS_KIND_WIDTH)
    return clean(name === '' ? `${title}${text}` : `${title}${name.padEnd(nameWidth)}${text}`)
  })
  return withoutOkUnlessHealthy(`${[known.reason, ...lines].join('\n')}\n`, known)
}

const STATUS_KIND_WIDTH = 11 // `instance`, the longest, and three blanks

const HEALTH_JSON = 'application/health+json'

/** In the shape of the draft "Health Check Response Format for HTTP APIs". */
function renderJson(known: Status): string {
  const rows = rowsOf(known)
  const isComplete = rows.every(({ grade }) => grade === 'pass')
  const whole = {
    status: gradeOf(known.healthy, isComplete),
    ...(!known.healthy && { output: known.reason }),
    description: known.url,
    checks: checksOf([
      ...rows,
      measured('requests:inFlight', known.requestsInFlight, 'requests'),
      measured('connections:upgraded', known.upgradedConnections, 'connections'),
      measured('eventLoop:utilization', known.eventLoopUtilization, 'ratio'),
      measured('memory:resident', known.residentMemoryBytes, 'B')
    ])
  }
  return withoutOkUnlessHealthy(`${JSON.stringify(whole, null, 2)}\n`, known)
}

function gradeOf(isHealthy: boolean, isComplete: boolean): Grade {
  if (!isHealthy) return 'fail'
  return isComplete ? 'pass' : 'warn'
}

function checksOf(rows: Row[]): Record<string, object[]> {
  const time = new Date().toISOString()
  const checks: Record<string, object[]> = {}
  for (const { kind, name, text, grade, measure, value, unit } of rows) {
    const check = {
      ...(name !== '' && { componentId: name }),
      componentType: kind === 'database' ? 'datastore' : 'component',
      status: grade,
      observedValue: value,
      observedUnit: unit,
      time,
      ...(text !== '' && { output: clean(text) })
    }
    checks[measure] = [...(checks[measure] ?? []), check]
  }
  return checks
}

// The page

const PAGE = 'the page' // a name with a blank, which no command of the service's own has

addCommand(
  PAGE,
  'Show the status to a browser',
  async (asker) => {
    if (!(asker instanceof Exchange)) return
    const nonce = crypto.randomUUID()
    const page = renderPage(await statusFor(asker), nonce, asker.query === 'pause')
    asker.headers['Content-Security-Policy'] =
      `default-src 'none'; style-src 'nonce-${nonce}'; base-uri 'none'; form-action 'none'; ` +
      `frame-ancestors 'none'`
    asker.reply(page, 200, 'text/html; charset=utf-8')
  },
  { hidden: true }
)

const PAGE_STYLE = `:root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif }
body { margin: 1rem auto; max-width: 50rem; padding: 0 1rem } h1, td { overflow-wrap: anywhere }
h1 { border-radius: .3rem; color: #fff; font-size: clamp(1.2rem, 6vw, 2rem); padding: .5rem 1rem }
h1.pass { background: #17692d } h1.fail { background: #a8201a }
tr.fail { color: light-dark(#a8201a, #ff9a92) } tr.warn { color: light-dark(#855000, #ffb454) }
th, td { padding: .1rem .8rem .1rem 0; text-align: start; vertical-align: top }
th { white-space: nowrap } td + td { width: 75% } progress { width: 6rem }
@media (max-width: 30rem) { td { display: block } td + td { width: auto } }
figure { margin: 1rem 0 } polyline { vector-effect: non-scaling-stroke }
svg { border: solid; border-width: 1px 0; fill: none; height: 6rem; stroke-width: 2; width: 100% }
.load { border-bottom: 3px solid #c77700; stroke: #c77700 }
.requests { border-bottom: 3px dashed #2f6fd0; stroke: #2f6fd0; stroke-dasharray: 6 3 }`

/** Refreshes itself without a script; `?pause` stops that. */
function renderPage(known: Status, nonce: string, isPaused: boolean): string {
  const offered = [...commands].filter(([, entry]) => entry.http && !entry.hidden)
  const refresh = isPaused ? '' : '<meta http-equiv="refresh" content="2">'
  const toggle = isPaused ? '<a href="/">Refresh</a>' : '<a href="?pause">Pause</a>'
  const page = `<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">${refresh}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>${escapeHtml(`${known.reason} - ${known.url}`)}</title>
<style nonce="${nonce}">${PAGE_STYLE}</style></head><body><main>
<h1 class="${known.healthy ? 'pass' : 'fail'}">${escapeHtml(known.reason)}</h1>
<p>${toggle}
<table>
${rowsOf(known).map(pageRow).join('\n')}
</table>
${renderChart(known, state.load.seconds)}
<p>${offered.map(([name]) => pageLink(name)).join(' ·\n')}</main></body></html>
`
  return withoutOkUnlessHealthy(page, known)
}

function pageRow({ kind, name, text, grade, progress }: Row): string {
  const head = `<tr class="${grade}"><th scope="row">${kind}`
  const title = name === '' ? '<td colspan="2">' : `<td>${escapeHtml(name)}<td>`
  const bar = progress === undefined ? '' : progressBar(`${kind} ${name}`, progress)
  return `${head}${title}${bar}${escapeHtml(text)}`
}

/** Without a value, a bar moves to and fro. */
function progressBar(label: string, progress: number): string {
  const value = progress < 0 ? '' : ` value="${progress}"`
  return `<progress aria-label="${escapeHtml(label)}"${value}></progress> `
}

function pageLink(name: string): string {
  return `<a href="/${encodeURIComponent(name)}">${escapeHtml(name)}</a>`
}

/** The busy part of the event loop, and requests a second, over the last two minutes. */
function renderChart({ eventLoopUtilization }: Status, seconds: Second[]): string {
  const loads = seconds.map(({ utilization }) => Math.max(0, utilization))
  const requests = seconds.map(({ requests: count }) => count)
  const most = Math.max(0, ...requests)
  const load = `loop ${percentage(Math.max(0, eventLoopUtilization))} % busy`
  const rate = `${requests.at(-1) ?? 0} requests a second (at most ${most})`
  const box = `viewBox="0 0 ${CHART_SECONDS - 1} 100" preserveAspectRatio="none"`
  return `<figure><svg ${box} aria-hidden="true">
${polyline('load', loads, 1)}
${polyline('requests', requests, most || 1)}
</svg><figcaption>The last two minutes: <span class="load">${load}</span>,
<span class="requests">${rate}</span></figcaption></figure>`
}

function polyline(name: string, values: number[], most: number): string {
  const left = CHART_SECONDS - values.length
  const points = values.map((value, x) => `${left + x},${(99 - (98 * value) / most).toFixed(1)}`)
  return `<polyline class="${name}" points="${points.join(' ')}"/>`
}

// --- The wire: lines -----------------------------------------------------------------------------

/** What a connection waits for, each with a limit of its own. */
type Phase = 'awaitingRequest' | 'idle' | 'running' | 'awaitingReader' | 'closing'

const PHASE_MS: Record<Phase, number> = {
  awaitingRequest: SEND_MS, // or a line
  idle: SILENCE_MS, // in interactive mode
  running: COMMAND_MS,
  awaitingReader: COMMAND_MS, // for a client that does not take our replies
  closing: LINGER_MS // until the client closes after us
}

const SESSION = Symbol('session')
type ClientSocket = net.Socket & { [SESSION]?: Session }

function openSession(socket: ClientSocket): void {
  const session = new LineSession(socket, findPlace())
  keepSession(session)
  socket.unref()
  socket.on('error', doNothing) // HAProxy resets every check
  socket.on('data', onData)
  socket.on('end', onEnd)
  socket.on('close', onSocketClose)
}

function keepSession(session: Session): void {
  const { socket, place } = session
  const client: ClientSocket = socket
  client[SESSION] = session
  state.monitor.sessions[place] = session
}

// Shared functions, so that a check does not make four closures.
function onData(this: ClientSocket, chunk: Buffer): void {
  const session = this[SESSION]
  if (session instanceof LineSession) session.receive(chunk)
}

function onEnd(this: ClientSocket): void {
  const session = this[SESSION]
  if (session instanceof LineSession) session.serve()
}

function onSocketClose(this: ClientSocket): void {
  const { sessions } = state.monitor
  const place = this[SESSION]?.place ?? -1
  if (sessions[place]?.socket === this) sessions[place] = undefined // else another's by now
}

function findPlace(): number {
  const free = state.monitor.sessions.indexOf(undefined)
  return free >= 0 ? free : makeRoom()
}

/** Closes a connection of the address that has most of them: the longest idle one, else the
 *  oldest. */
function makeRoom(): number {
  const sessions = state.monitor.sessions.filter((session) => session !== undefined)
  const countByAddress = new Map<string | undefined, number>()
  for (const { remoteAddress } of sessions) {
    countByAddress.set(remoteAddress, (countByAddress.get(remoteAddress) ?? 0) + 1)
  }
  const most = Math.max(...countByAddress.values())
  const candidates = sessions.filter(
    ({ remoteAddress }) => countByAddress.get(remoteAddress) === most
  )
  const idle = candidates.filter(({ phase }) => phase !== 'running')
  idle.sort(
    (one, other) => one.phaseSinceMs - other.phaseSinceMs || one.openedAtMs - other.openedAtMs
  )
  candidates.sort((one, other) => one.openedAtMs - other.openedAtMs)
  const leaving = idle[0] ?? candidates[0]
  leaving?.cutOff()
  return leaving?.place ?? 0
}

/** A connection: its place among all, and its limits. */
abstract class Session {
  readonly socket: net.Socket
  readonly place: number
  openedAtMs = performance.now()
  phase: Phase = 'awaitingRequest'
  phaseSinceMs = state.clock.nowMs

  constructor(socket: net.Socket, place: number) {
    this.socket = socket
    this.place = place
  }

  get remoteAddress(): string | undefined {
    return this.socket.remoteAddress
  }

  /** Whoever reaches our Unix socket is on this machine. */
  get local(): boolean {
    return state.monitor.endpoint.path !== undefined || isLocal(this.socket)
  }

  enter(phase: Phase): void {
    this.phase = phase
    this.phaseSinceMs = state.clock.nowMs
  }

  end(): void {
    if (this.phase === 'closing') return // a second end() would build an error with its stack
    this.enter('closing')
    this.socket.end()
  }

  enforceLimit(): void {
    const hasUnsentReply = this.phase === 'closing' && this.socket.writableLength > 0
    const limitMs = PHASE_MS[hasUnsentReply ? 'awaitingReader' : this.phase]
    if (state.clock.nowMs - this.phaseSinceMs < limitMs) return
    if (this.phase === 'running') this.giveUpCommand()
    else this.cutOff()
  }

  /** Ends at once; by a reset within a reply, so that nobody takes a part of it for the whole. */
  cutOff(): void {
    const isInReply = this.phase === 'running' || this.socket.writableLength > 0
    if (isInReply) attempt(() => this.socket.resetAndDestroy()) // Unix sockets have none
    this.socket.destroy()
  }

  /** Tells the asker that its command takes too long, and ends the connection. */
  abstract giveUpCommand(): void
}

/** A connection that sends lines. It begins in quit mode: a command, its reply, the end. */
class LineSession extends Session implements Asker {
  readonly isHttp = false
  mode: Mode = 'quit'
  unread: Buffer = NOTHING
  /** The words of the last command. */
  lastWords: string[] = []
  /** Whether the next line has to wait. */
  isBusy = false

  get isPerson(): boolean {
    return this.mode === 'interactive'
  }

  write(text: string): void {
    if (this.phase === 'closing' || this.socket.destroyed) return
    if (this.socket.writableLength > UNSENT_MAX) this.cutOff()
    else this.socket.write(text)
  }

  refuse(text: string): void {
    this.write(text)
  }

  receive(chunk: Buffer): void {
    if (this.phase === 'closing') return
    this.unread = this.unread.length > 0 ? Buffer.concat([this.unread, chunk]) : chunk
    if (this.isBusy && this.unread.length > LINE_MAX) this.socket.pause()
    this.serve()
  }

  /** Takes one line after the other, each when the reply to the one before is done and taken. */
  serve(): void {
    for (let turn = 0; !this.isBusy && this.phase !== 'closing'; turn++) {
      if (turn === LINES_PER_TURN) {
        this.isBusy = true
        setImmediate(() => this.goOn())
        return
      }
      if (this.socket.writableNeedDrain) {
        this.waitForReader()
        return
      }
      const line = this.takeLine()
      if (line === undefined) return
      this.execute(line.match(/\S+/g) ?? [])
    }
  }

  waitForReader(): void {
    const { phase } = this
    this.isBusy = true
    this.enter('awaitingReader')
    this.socket.once('drain', () => {
      this.enter(phase)
      setImmediate(() => this.goOn()) // a reader who keeps up would leave the application no turn
    })
  }

  goOn(): void {
    this.isBusy = false
    this.serve()
  }

  /** Gives the next line; nothing where it is not complete, not for us, or the last. */
  takeLine(): string | undefined {
    const { unread, socket } = this
    const feedAt = unread.indexOf(LINE_FEED)
    const isComplete = feedAt >= 0
    const length = isComplete ? feedAt : unread.length
    const line = unread.toString('utf8', 0, length)

    if (this.lastWords.length === 0 && looksLikeHttp(line, isComplete)) {
      becomeHttp(this)
      return undefined
    }
    if (length > LINE_MAX) {
      this.write('Line too long\n')
      this.end()
      return undefined
    }
    if (!isComplete && !socket.readableEnded) {
      socket.resume()
      return undefined
    }
    if (unread.length === 0) {
      this.end()
      return undefined
    }
    this.unread = length + 1 < unread.length ? unread.subarray(length + 1) : NOTHING
    return line
  }

  /** An empty line repeats the last command; in `more` mode every line is its arguments. */
  execute(words: string[]): void {
    const isMore = this.mode === 'more'
    if (!isMore && words.length > 0) this.lastWords = words
    const [name, ...args] = this.lastWords
    if (name === undefined) return

    this.enter('running')
    const answer = runCommand(name, isMore ? words : args, this)
    if (answer instanceof Promise) {
      this.isBusy = true
      void this.followLater(answer)
      return
    }
    this.follow(answer)
  }

  async followLater(answer: Promise<Mode | void>): Promise<void> {
    this.follow(await answer)
    if (this.phase !== 'closing') setImmediate(() => this.goOn()) // the application has its turn
  }

  follow(mode: Mode | void): void {
    if (mode) this.mode = mode
    if (this.mode === 'quit') {
      this.end()
      return
    }
    if (this.phase === 'closing') return
    this.enter('idle')
    this.socket.setNoDelay() // else replies to pipelined lines would wait for the client's ACKs
  }

  giveUpCommand(): void {
    const [name] = this.lastWords
    this.write(`${toRedLine(`Error: ${name} timed out`)}\n`)
    this.end()
  }
}

const NOTHING = Buffer.alloc(0)
const LINE_FEED = 0x0a

/** Whether Node.js is to judge it: any method, since a browser can be made to send `drain /
 *  HTTP/1.1`, and a line that is too long for a command but begins as HTTP does. */
function looksLikeHttp(line: string, isComplete: boolean): boolean {
  if (isComplete) return HTTP_REQUEST_LINE.test(line)
  return line.length > LINE_MAX && HTTP_REQUEST_START.test(line)
}

const HTTP_REQUEST_LINE = /\sHTTP\/\d\S*\s*$/i // GET /health_check HTTP/1.1
const HTTP_REQUEST_START = /^[A-Z]+ \S/ // GET /health_che

// --- The wire: HTTP ------------------------------------------------------------------------------

/** Never listens, but takes sockets over: so all time limits but `keepAliveTimeout` are ours. */
const httpServer: http.Server & { httpAllowHalfOpen?: boolean } =
  http.createServer(onMonitorRequest)
httpServer.httpAllowHalfOpen = true // as `nc -N` does
httpServer.maxRequestsPerSocket = REQUESTS_PER_CONNECTION
httpServer.on('dropRequest', (_, socket) => socket.destroy())

/** Hands the connection over to Node.js's HTTP server, with all that was read of it. */
function becomeHttp(lines: LineSession): void {
  const { socket, unread } = lines
  keepSession(new HttpSession(lines))
  socket.off('data', onData)
  socket.off('end', onEnd)
  socket.unshift(unread)
  httpServer.emit('connection', socket)
}

function onMonitorRequest(request: http.IncomingMessage, response: http.ServerResponse): void {
  const session = (request.socket as ClientSocket)[SESSION]
  if (session instanceof HttpSession) session.accept(new Exchange(session, response))
  else response.destroy() // stopped meanwhile
}

/** A connection that sends HTTP. Its requests are answered one after the other. */
class HttpSession extends Session {
  readonly waiting: Exchange[] = []
  current: Exchange | undefined

  constructor({ socket, place, openedAtMs, phaseSinceMs }: LineSession) {
    super(socket, place)
    this.openedAtMs = openedAtMs
    this.phaseSinceMs = phaseSinceMs // the head has its 60 s from its first byte on
  }

  accept(exchange: Exchange): void {
    this.waiting.push(exchange)
    if (!this.current) this.answerNext()
  }

  answerNext(): void {
    if (this.phase === 'closing' || this.socket.destroyed) return
    const exchange = this.waiting.shift()
    if (!exchange) return
    this.current = exchange
    this.enter('running')
    const answer = exchange.run()
    if (answer instanceof Promise) void this.finishLater(exchange, answer)
    else this.finish(exchange)
  }

  async finishLater(exchange: Exchange, answer: Promise<unknown>): Promise<void> {
    await answer
    if (this.phase === 'running') this.finish(exchange) // else given up meanwhile
  }

  /** The next request waits until this reply is taken, and until the application has had its
   *  turn. */
  finish(exchange: Exchange): void {
    this.enter('awaitingReader')
    exchange.response.once('finish', () => setImmediate(() => this.goOn()))
    exchange.send()
  }

  goOn(): void {
    if (this.phase === 'closing') return
    this.current = undefined
    this.enter('awaitingRequest')
    this.answerNext()
  }

  giveUpCommand(): void {
    const { current } = this
    this.current = undefined
    current?.refuse(`${toRedLine(`Error: ${current.name} timed out`)}\n`, 500)
    current?.send()
    this.end()
  }
}

/** One request: its path names the command; the answer is sent when it is complete. */
class Exchange implements Asker {
  readonly isHttp = true
  readonly session: HttpSession
  readonly response: http.ServerResponse
  readonly name: string
  readonly args: string[]
  readonly query: string
  readonly headers: Record<string, string | number> = {}
  code = 200
  /** The media type, where it is not that of the command. */
  type: string | undefined
  body = ''

  constructor(session: HttpSession, response: http.ServerResponse) {
    const { url = '', headers } = response.req
    const [path = '', query = ''] = url.split('?')
    const root = headers.accept?.includes('text/html') ? PAGE : 'help'
    const [name = root, ...args] = segmentsOf(path) ?? [path] // no command has such a name
    this.session = session
    this.response = response
    this.name = name
    this.args = args
    this.query = query
  }

  get remoteAddress(): string | undefined {
    return this.session.remoteAddress
  }

  /** Browsers send Sec-Fetch-Site, balancers do not. */
  get isPerson(): boolean {
    return 'sec-fetch-site' in this.response.req.headers
  }

  get local(): boolean {
    const { req: request } = this.response
    const isOnUnixSocket = state.monitor.endpoint.path !== undefined // which no web page reaches
    if (!this.session.local || (!isOnUnixSocket && !isOwnName(request))) return false
    return !isForwarded(request, ['none', 'same-origin']) // our own page refreshes itself
  }

  run(): Answer {
    const { method = '' } = this.response.req
    if (method === 'GET' || method === 'HEAD') return runCommand(this.name, this.args, this)
    this.refuse('Only GET and HEAD are answered here\n', 405)
  }

  write(text: string): void {
    if (this.response.headersSent) return
    if (this.body.length > UNSENT_MAX) this.session.cutOff()
    else this.body += text
  }

  refuse(text: string, code: number): void {
    this.reply(text, code, PLAIN_TEXT)
  }

  reply(text: string, code: number, type: string): void {
    this.write(text)
    this.code = code
    this.type = type
  }

  send(): void {
    const { response, code, body, name, headers } = this
    if (response.headersSent) return
    headers['Content-Type'] = this.type ?? commands.get(name)?.type ?? PLAIN_TEXT
    headers['Content-Length'] = Buffer.byteLength(body)
    headers['Cache-Control'] = 'no-store'
    headers['X-Content-Type-Options'] = 'nosniff'
    if (code === 405) headers['Allow'] = 'GET, HEAD'
    response.writeHead(code, headers)
    response.end(body)
  }
}

/** Gives the parts of a path, decoded; undefined where they cannot be decoded. */
function segmentsOf(path: string): string[] | undefined {
  return attempt(() => path.split('/').filter(Boolean).map(decodeURIComponent))
}

// --- Helpers -------------------------------------------------------------------------------------

function doNothing(): void {}

function must(
  holds: unknown,
  sentence: string,
  Kind: new (message: string) => Error = TypeError
): asserts holds {
  if (!holds) throw new Kind(`ftw-monitor: ${sentence}`)
}

/** What an asker, or the environment, did wrong: told in these words, without a stack. */
class Refusal extends Error {}

function failWith(text: string): never {
  throw new Refusal(text)
}

function isRefusal(error: unknown): error is Refusal {
  return attempt(() => error instanceof Refusal) ?? false
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null
}

function hasMethods(value: unknown, ...names: string[]): boolean {
  return isObject(value) && names.every((name) => typeof value[name] === 'function')
}

function hasOnly(value: unknown, names: string[]): value is Record<string, unknown> {
  return isObject(value) && Object.keys(value).every((name) => names.includes(name))
}

function mayHaveMethod(value: object, name: string): boolean {
  return Reflect.get(value, name) === undefined || hasMethods(value, name)
}

/** Text without white space or control characters. */
function isWord(name: unknown): boolean {
  return typeof name === 'string' && /^[^\s\p{C}]+$/u.test(name)
}

/** Gives undefined if the function throws, as getters and methods of foreign objects may. */
function attempt<T>(look: () => T): T | undefined {
  try {
    return look()
  } catch {
    return undefined
  }
}

interface Deferred<T> {
  promise: Promise<T>
  resolve: (value: T) => void
  reject: (error: unknown) => void
}

function deferred<T>(): Deferred<T> {
  let resolve: Deferred<T>['resolve'] = doNothing
  let reject: Deferred<T>['reject'] = doNothing
  const promise = new Promise<T>((...settlers) => {
    resolve = settlers[0]
    reject = settlers[1]
  })
  return { promise, resolve, reject }
}

// Who is on this machine

function isLocal({ remoteAddress, localAddress }: net.Socket): boolean {
  if (remoteAddress === undefined) return false
  return remoteAddress === localAddress || LOCAL_ADDRESS.test(remoteAddress)
}

const LOCAL_ADDRESS = /^((::ffff:)?127\.|::1$)/ // 127.0.0.1, ::ffff:127.0.0.1, ::1

/** Behind a proxy on this machine every visitor looks local, and so does a page in its browser,
 *  unless it comes from one of these sites, in the words of `Sec-Fetch-Site`. */
function isForwarded({ headers }: http.IncomingMessage, ownSites: string[]): boolean {
  const fetchSite = headers['sec-fetch-site']?.toString() ?? siteOfOldBrowser(headers)
  if (!ownSites.includes(fetchSite)) return true
  return Object.keys(headers).some((name) => FORWARDING_HEADER.test(name))
}

/** Older browsers send no Sec-Fetch-Site, but each of them claims to be Mozilla. */
function siteOfOldBrowser(headers: http.IncomingHttpHeaders): string {
  return (headers['user-agent'] ?? '').startsWith('Mozilla/') ? 'unknown' : 'none'
}

const FORWARDING_HEADER = /^(forwarded|x-forwarded-.*|x-real-ip|via|origin)$/

// The environment

function readEnv(name: string): string | undefined {
  return process.env[name]?.trim() || undefined
}

/** What the environment says, as `read` understands it; undefined where it says nothing. */
function readEnvAs<T>(name: string, read: (text: string) => T | undefined): T | undefined {
  const text = readEnv(name)
  if (text === undefined) return undefined
  return read(text) ?? failWith(`cannot use ${name}=${text}; mend it`)
}

function isSwitchedOff(name: string): boolean {
  return /^(0|false|no|off)$/i.test(readEnv(name) ?? '')
}

// Texts and errors

function withoutSlashes(path: string): string {
  return path.replace(/\/+$/, '')
}

/** Replaces each character that could forge a line or steer a terminal by a blank, since without it
 *  two words might join to a third one. */
function clean(text: string): string {
  return text.replace(CONTROL_CHARACTER, ' ')
}

const CONTROL_CHARACTER = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu

function escapeHtml(text: string): string {
  return clean(text).replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`)
}

/** Describes whatever was thrown; never gives an empty text. */
function errorText(error: unknown): string {
  return attempt(() => describeError(error)) || 'an error that cannot be put into words'
}

function describeError(error: unknown): string {
  if (!(error instanceof Error)) return String(error).slice(0, REASON_MAX)

  const { message, cause, code, name } = error as NodeJS.ErrnoException
  if (message === 'fetch failed' && cause) return errorText(cause)
  const text = [message, code, name].find(Boolean) // a refused localhost has its code alone
  return String(text).slice(0, REASON_MAX) + adviceFor(message, String(code))
}

function adviceFor(message: unknown, code: string): string {
  if (message === 'bad port') return ' for fetch; register a warm-up performer that does without it'
  if (/_ALTNAME_/.test(code)) return '; set FTW_MONITOR_URL, or url, to a name that it has'
  if (!/^(UNABLE_|SELF_|DEPTH_)/.test(code)) return ''
  return "; set NODE_EXTRA_CA_CERTS to its issuer's file"
}

/** The frames of a stack, without its message, which may come from outside and look like one. */
function framesOf(error: unknown): string[] {
  const frames = attempt(() => {
    const { message, stack = '' } = error as Error
    const messageAt = stack.indexOf(message)
    return messageAt < 0 ? [] : stack.slice(messageAt + message.length).match(STACK_FRAME)
  })
  return frames ?? []
}

const STACK_FRAME = /(?<=\n) +at [^\n]*/g //     at main (server.js:1:1)

/** Logs one line, and the frames of a stack. A logger that fails must not be the host's end. */
function log(level: keyof Logger, ...lines: string[]): void {
  const text = `ftw-monitor ${lines.map(clean).join('\n')}`
  void logSafely(state.app.logger, level, text)
}

async function logSafely(logger: Logger, level: keyof Logger, text: string): Promise<void> {
  try {
    const logged: unknown = logger[level](text) // which may be a promise
    await logged
  } catch {
    // There is nobody left to tell.
  }
}

// --- The program; all from here on may be deleted, and nothing above refers to it ----------------

/** Runs the program, and gives its exit status. */
async function main(words: string[]): Promise<number> {
  const [first] = words
  if (first === '--help' || first === '-h') return print(USAGE)
  if (first === '--version') return print(VERSION)
  if (first === 'demo') return runDemo()
  if (first === 'dump-perf-metrics') return dumpPerfMetrics(words.slice(1))

  const monitor = findMonitor(takeOption(words, 'port'), takeOption(words, 'host'))
  const [name] = words
  if (name === 'wait') return waitUntilHealthy(monitor, words)
  if (name === 'status') return showStatus(monitor, words.slice(1))
  if (name?.startsWith('-')) failWith(`knows no ${name}; try ftw-monitor --help`)
  return sendCommand(monitor, words)
}

const VERSION = '1.0.0'

const USAGE = `ftw-monitor COMMAND [ARGS…]       sends a command, and prints the reply
ftw-monitor                       lists the commands, as ftw-monitor help does
ftw-monitor interactive           joins the terminal to the monitor, until quit
ftw-monitor wait [--timeout 300]  waits until the instance is healthy
ftw-monitor status [--watch] [[NAME=][HOST:]PORT…]
                                  shows how the instance is, or a line for each of several
ftw-monitor dump-perf-metrics [--deployment NAME] [NAME=][HOST:]PORT…
                                  prints the figures of instances for InfluxDB
ftw-monitor demo                  runs a small instance to try everything on

--port N    the instance's port (default: PORT, else 8080)
--host H    the instance's host (default: HOST, else localhost)
--help, -h, --version

Exit status: 0; 1 where the instance is not healthy, or its reply is an error; 2 where the monitor
cannot be reached, or does not know the command.`

function print(text: string): number {
  console.log(text)
  return 0
}

async function sendCommand(monitor: net.NetConnectOpts, words: string[]): Promise<number> {
  const line = words.join(' ').trim() || 'help'
  if (/[\r\n]/.test(line)) failWith('a command is one line')

  const [name] = line.split(/\s+/)
  const isInteractive = name === 'interactive'
  const socket = net.connect(monitor)
  if (isInteractive) joinTerminal(socket)
  const limitMs = isInteractive ? SILENCE_MS : COMMAND_MS
  const reply = await talk(socket, `${line}\n`, limitMs, printPart)
  return exitStatus(name, reply)
}

function exitStatus(name: string | undefined, reply: string): number {
  if (name === 'interactive') return 0
  if (name === 'health_check' || name === 'readyz') return reply === 'OK\n' ? 0 : 1
  if (name === 'agent_check') return reply.startsWith('up ') ? 0 : 1
  if (reply.startsWith("Invalid command '")) return 2
  return FAILED_REPLY.test(reply) ? 1 : 0
}

// RangeError: no such queue
const FAILED_REPLY =
  /(^|\n)(\w*Error: .*|Not drained.*|Line too long|\S+ is for .*|\S+ returned .* instead .*)\n$/

function joinTerminal(socket: net.Socket): void {
  socket.on('close', () => process.stdin.destroy())
  process.stdin.pipe(socket)
}

function printPart(part: string): void {
  process.stdout.write(part.replace(/[^\n\t]+/g, clean))
}

/** Takes `--name value` or `--name=value` out of the words. */
function takeOption(words: string[], name: string): string | undefined {
  const prefix = `--${name}=`
  const at = words.findIndex((word) => word === `--${name}` || word.startsWith(prefix))
  const word = words[at]
  if (word === undefined) return undefined

  if (word.startsWith(prefix)) {
    words.splice(at, 1)
    return word.slice(prefix.length)
  }
  const [, value] = words.splice(at, 2)
  return value ?? failWith(`--${name} needs a value`)
}

/** Where the monitor listens: as the options say, else as the instance itself would find out. */
function findMonitor(instancePort?: string, instanceHost?: string): net.NetConnectOpts {
  const told = instancePort === undefined ? endpointInEnvironment() : {}
  if (told.path !== undefined && instanceHost === undefined) return { path: told.path }

  const bound = instanceHost ?? told.host ?? readEnv('HOST') ?? ''
  const port = told.port ?? portBeside(instancePort ?? readEnv('PORT') ?? '8080')
  return { host: hostReaching(bound), port }
}

function portBeside(instancePort: string): number {
  const port = toPort(instancePort)
  const monitorPort = port === undefined ? undefined : toPort(String(port + PORT_OFFSET))
  return monitorPort ?? failWith(`${instancePort} is no instance port`)
}

/** Sends text, and gives all that comes back until the other side closes. The limit is for the
 *  whole reply; or, where its parts are shown as they come, for each of them. */
async function talk(
  socket: net.Socket,
  text: string,
  limitMs: number,
  showPart?: (part: string) => void
): Promise<string> {
  const late = new Error(`no answer within ${limitMs / 1_000} s`)
  const timer = setTimeout(() => socket.destroy(late), limitMs).unref()
  socket.setEncoding('utf8').write(text)

  let reply = ''
  for await (const part of socket as AsyncIterable<string>) {
    reply = (reply + part).slice(0, UNSENT_MAX)
    if (!showPart) continue
    showPart(part)
    timer.refresh()
  }
  return reply
}

const FIGURES_ANSWER_MS = 1_000 // as in ftw.monitor
const STATUS_ANSWER_MS = 2_000 // a database has most of a second to answer

/** Waits until the instance is healthy, and prints why it is not. */
async function waitUntilHealthy(to: net.NetConnectOpts, words: string[]): Promise<number> {
  const timeout = takeOption(words, 'timeout') ?? '300'
  const [, unknown] = words
  if (unknown !== undefined) failWith(`wait knows no ${unknown}; try ftw-monitor --help`)
  const timeoutSeconds = timeout === '' ? NaN : Number(timeout)
  if (!(timeoutSeconds >= 0)) failWith('--timeout needs a number of seconds')

  let progressBefore = ''
  for (;;) {
    const progress = await askProgress(to)
    if (progress !== progressBefore) console.log(`${process.uptime().toFixed(1)} s  ${progress}`)
    progressBefore = progress
    if (progress === 'OK') return 0
    if (process.uptime() > timeoutSeconds) return 1
    await wakeAfter(TICK_MS)
  }
}

function wakeAfter(ms: number): Promise<void> {
  return new Promise((resolve) => {
    setTimeout(resolve, ms)
  })
}

/** Asks for the status, which is no check, so that `drain` does not wait for us. */
async function askProgress(to: net.NetConnectOpts): Promise<string> {
  try {
    const [reason = '', ...lines] = await askStatus(to)
    const sites = lines.filter((line) => line.startsWith('warm-up'))
    const running = sites.findIndex((line) => / running for /.test(line))
    if (reason !== 'Warmup in progress' || running < 0) return reason || 'no answer'
    const [, site] = sites[running]?.split(/ +/) ?? []
    return `${reason}: ${site}, ${running + 1} of ${sites.length}`
  } catch (error) {
    return clean(errorText(error))
  }
}

/** Gives the lines of the status; the first one is the verdict. */
async function askStatus(to: net.NetConnectOpts): Promise<string[]> {
  const reply = await talk(net.connect(to), 'status\n', STATUS_ANSWER_MS)
  return reply.trimEnd().split('\n').map(clean)
}

/** Prints the status of one instance, or a line for each of several; once, or every second. */
async function showStatus(monitor: net.NetConnectOpts, words: string[]): Promise<number> {
  const instances = words.filter((word) => word !== '--watch')
  const wrong = instances.find((word) => word.startsWith('-'))
  if (wrong !== undefined) failWith(`knows no ${wrong}; try ftw-monitor --help`)

  const look = (): Promise<Shown> =>
    instances.length > 0 ? fleetStatus(instances) : ownStatus(monitor)
  if (words.includes('--watch')) return watchStatus(look)

  const { lines, healthy } = await look()
  print(lines.join('\n'))
  return healthy ? 0 : 1
}

/** Renews what is shown every second, in its place on a terminal, until Ctrl-C. */
async function watchStatus(look: () => Promise<Shown>): Promise<never> {
  let exitCode = 1
  let rowsBefore = 0
  process.once('SIGINT', () => process.exit(exitCode))
  process.stdout.once('error', () => process.exit(exitCode)) // `| head -1`
  for (;;) {
    const { lines, healthy } = await look().catch(unreachable)
    exitCode = healthy ? 0 : 1
    if (process.stdout.isTTY) rowsBefore = renewRows(lines, rowsBefore)
    else print(lines.join('\n'))
    await wakeAfter(WATCH_MS)
  }
}

const WATCH_MS = 1_000

/** Writes over the rows of the terminal that were printed before, and gives how many there are
 *  now. */
function renewRows(lines: string[], rowsBefore: number): number {
  const columns = process.stdout.columns || 80 // some terminals do not know their size
  const rows = process.stdout.rows || 24
  const fitting = lines.slice(0, rows - 1) // what has left the screen cannot be written over
  const back = rowsBefore > 0 ? `\x1b[${rowsBefore}A\x1b[J` : ''
  process.stdout.write(`${back}${fitting.join('\n')}\n`)

  let count = 0
  for (const { length } of fitting) count += Math.max(1, Math.ceil(length / columns)) // wrapped
  return count
}

interface Shown {
  lines: string[]
  healthy: boolean
}

/** An instance that is restarted is not the end of watching it. */
function unreachable(error: unknown): Shown {
  return { lines: [clean(errorText(error))], healthy: false }
}

async function ownStatus(monitor: net.NetConnectOpts): Promise<Shown> {
  const lines = await askStatus(monitor)
  return { lines, healthy: lines[0] === 'OK' }
}

async function fleetStatus(words: string[]): Promise<Shown> {
  const all = await Promise.all(words.map(instanceStatus))
  const nameWidth = Math.max(...all.map(({ name }) => name.length))
  const reasonWidth = Math.min(
    FLEET_REASON_MAX,
    Math.max(...all.map(({ reason }) => reason.length))
  )
  const lines = all.map(({ name, reason, figures }) => {
    const shown = figures === '' ? reason : reason.slice(0, reasonWidth).padEnd(reasonWidth)
    return `${name.padEnd(nameWidth)}  ${shown}  ${figures}`.trimEnd()
  })
  return { lines, healthy: all.every(({ reason }) => reason === 'OK') }
}

const FLEET_REASON_MAX = 30 // characters, so that a line fits into 80

/** Gives the verdict and, of the line about the instance, what stands behind its address. */
async function instanceStatus(
  word: string
): Promise<{ name: string; reason: string; figures: string }> {
  const [, name = word] = NAMED_INSTANCE.exec(word) ?? []
  try {
    const { monitor } = parseInstance(word)
    const [reason = '', instance = ''] = await askStatus(monitor)
    const figures = instance.replace(/^.*?, /, '').replace(/ requests|, \d+ upgraded| busy/g, '')
    return { name, reason: reason || 'no answer', figures }
  } catch (error) {
    return { name, reason: clean(errorText(error)), figures: '' }
  }
}

/** Prints the figures of many instances in InfluxDB's line protocol, as ftw.monitor does. */
async function dumpPerfMetrics(words: string[]): Promise<number> {
  const folder = process.cwd().replace(/.*[/\\]/, '')
  const deployment = escapeTag(takeOption(words, 'deployment') ?? folder)
  const lines = await Promise.all(words.map((word) => dumpInstance(word, deployment)))
  process.stdout.write(lines.sort().join(''))
  return lines.some(Boolean) ? 0 : 1
}

/** Gives the line of an instance, '' with a complaint where there is none. */
async function dumpInstance(word: string, deployment: string): Promise<string> {
  try {
    const { name, monitor } = parseInstance(word)
    const json = await talk(net.connect(monitor), 'perf_metrics\n', FIGURES_ANSWER_MS)
    const tags = `deployment=${deployment},process=${escapeTag(name)}`
    return `deployments,${tags} ${toFields(json)}\n`
  } catch (error) {
    complain(`${word}: ${errorText(error)}`)
    return ''
  }
}

/** Reads `10301`, `host:10301` or `web1=10301`: a port of the instance, and its name. */
function parseInstance(word: string): { name: string; monitor: net.NetConnectOpts } {
  const [, name = word, address = ''] = NAMED_INSTANCE.exec(word) ?? []
  const { host = 'localhost', port = address } = toEndpoint(address) ?? {}
  return { name, monitor: findMonitor(String(port), host) }
}

const NAMED_INSTANCE = /^(?:([^=]+)=)?(.*)$/s // web1=10301

function complain(error: unknown): void {
  console.error(`ftw-monitor: ${clean(errorText(error))}`)
}

/** Writes `{ group: { name: value } }` as `group.name=value`, sorted; only numbers and text
 *  count. */
function toFields(json: string): string {
  const { error = 'no figures', ...groups } = Object(JSON.parse(json)) as Record<string, unknown>
  const fields: string[] = []
  for (const [group, values] of Object.entries(groups)) {
    if (!isObject(values)) continue
    for (const [name, value] of Object.entries(values)) {
      const text = toField(value)
      if (text !== undefined) fields.push(`${escapeTag(`${group}.${name}`)}=${text}`)
    }
  }
  return fields.sort().join(',') || failWith(errorText(error))
}

function toField(value: unknown): string | undefined {
  if (typeof value === 'string') return JSON.stringify(clean(value))
  return Number.isFinite(value) ? String(value) : undefined
}

function escapeTag(text: string): string {
  const ended = clean(text).replace(/\\+$/, '') // a backslash would escape what follows
  return ended.replace(/[,= ]/g, '\\$&') || 'unnamed'
}

/** Runs a small instance to try everything on. */
async function runDemo(): Promise<number> {
  const { loads } = registerDatabase('main', { isConnected: () => true })
  registerWarmup('/', () => new Promise((resolve) => setTimeout(resolve, 3_000).unref()))
  const server = http.createServer((_, response) => {
    loads()
    response.end('Hello from the demo of ftw-monitor\n')
  })
  shutdownOnSignal()
  server.on('error', complain)
  server.listen(Number(readEnv('PORT') ?? 8080), readEnv('HOST'))
  await start(server)
  return 0
}

/** Whether this file was called, and not imported. It may also be part of somebody's bundle. */
function isProgram(): boolean {
  const meta: ImportMeta & { main?: boolean } = import.meta
  if (!/\/monitor\.[jt]s$/.test(meta.url)) return false
  if (meta.main !== undefined) return meta.main

  // Node.js 20 has no import.meta.main; there an installed program is called by a link to it.
  const path = process.argv[1]?.replace(/[%?#\s]/g, encodeURIComponent)
  return meta.resolve(`file:${path}`) === meta.url
}

async function runProgram(): Promise<void> {
  process.exitCode = 2 // until main() tells better
  process.stdout.on('error', doNothing) // `| head -1`
  try {
    process.exitCode = await main(process.argv.slice(2))
  } catch (error) {
    complain(error)
  }
}

if (isProgram()) void runProgram()
