#!/usr/bin/env node
// ftw-monitor: tells load balancers, probes and people whether this instance may be sent requests
//
// Version 1.0.0. Copyright (c) 2026 the ftw-monitor authors.
// SPDX-License-Identifier: MIT
//
// An ES module without dependencies, for Node.js from 20 on, Bun and Deno.
//
// It listens at the instance's port + 80, warms the instance up, and answers commands:
//
//   const server = http.createServer(app)          $ printf 'health_check\n' | nc localhost 8160
//   start(server)                                  OK
//   server.listen(8080)
//
// A line, or a request over HTTP, names a command of the command table. Behind every command that
// tells how the instance is stands one verdict: may it be sent requests, and if not, why?
//
// The core comes first, and can be read and signed alone. Each of the layers behind it may be cut
// off with all that follows it: a layer adds to the core from below, and the core knows of none. A
// section, under a banner of the same words, keeps the state, the timers and the functions of one
// concern together; those of a layer are listed at its head.
//
//   Public types
//   Limits
//   Copies of this file
//   The monitor and its life
//   The clock
//   Addresses
//   The address of the instance
//   The listener
//   The traffic
//   Servers that stop listening
//   Sending clients elsewhere
//   The verdict
//   Databases and checks
//   Shared calls
//   Warm-up
//   Who asks
//   Probers
//   Draining
//   Shutdown
//   Signals
//   The command table
//   Commands
//   The wire: connections
//   The wire: lines
//   The wire: HTTP
//   Helpers
//   The module
//   Layer: unmodified programs; all from here on may be deleted, and nothing above refers to it
//   Layer: pages and balancers; all from here on may be deleted, and nothing above refers to it
//   Layer: figures and metrics; all from here on may be deleted, and nothing above refers to it
//   Layer: status and page; all from here on may be deleted, and nothing above refers to it
//   Layer: the program; all from here on may be deleted, and nothing above refers to it

import * as http from 'node:http'
import * as net from 'node:net'

/** The version of this file, also where it was copied into another project. */
export const VERSION: string = '1.0.0'

// --- Public types --------------------------------------------------------------------------------

/** What follows on a connection: its end, commands until `quit`, or lines for the same command. */
export type Mode = 'quit' | 'interactive' | 'more'

/** Who asked a command. */
export interface Connection {
  /** Sends text to the asker, unchanged. */
  write(text: string): void
  /** The asker's IP address; `undefined` on a Unix socket, and after the asker's reset. */
  readonly remoteAddress: string | undefined
  /** Whether the asker is on this machine. */
  readonly local: boolean
}

/** Replies by `connection.write` within 30 s, over lines at least every 30 s, and may return, or
 *  resolve to, the mode to follow. The asker may leave arguments out. */
export type Command = (
  connection: Connection,
  ...args: (string | undefined)[]
) => Mode | void | Promise<Mode | void>

/** Who may run a command besides those who connect to the monitor port and send its line. */
export interface CommandOptions {
  /** Offer it as `GET /NAME/ARG…` too (default: no). Any web page can make a browser send a GET, so
   *  this is only for commands that change nothing. */
  http?: boolean
  /** Refuse askers that are not on this machine (default: no). Not together with `http`. */
  local?: boolean
}

/** Whatever the instance cannot serve without. */
export interface Database {
  /** Whether the instance can do without it (default: no): it never makes the verdict red, and is a
   *  warning in `status`. */
  optional?: boolean
  /** Asked when somebody asks for the verdict, and once when a boot, a warm-up or a drain ends. Has
   *  900 ms to answer. Only `true` itself is connected: neither `1` nor what a query returns.
   *  A check shares a call that is pending. */
  isConnected(): boolean | Promise<boolean>
}

/** Whatever else the instance cannot serve without: it passes if it returns, or resolves to,
 *  anything but `false`, within 900 ms, and does not throw. `undefined`, `null`, `0` and `''` pass,
 *  too, so that a check may just throw. A check of the instance shares a call that is pending. */
export type Check = () => unknown

/** What `registerCheck` may be told. */
export interface CheckOptions {
  /** Whether the instance can do without it (default: no): it never makes the verdict red, and is a
   *  warning in `status`. */
  optional?: boolean
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

/** What a warm-up performer is told. */
export interface Warmup {
  /** The path of the site, as it was registered: `/` or `/shop`. */
  site: string
  /** The site's address on this very instance; it never ends with a slash, so that
   *  `${url}/catalogue` is a page of it. It has no credentials, since fetch refuses them there. */
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

/** A server of `node:http`, `node:https` or `node:http2`. All of these have a `setTimeout`, but a
 *  plain `net.Server`, which serves no requests, has none. */
export interface WebServer extends net.Server {
  setTimeout(milliseconds?: number): unknown
}

/** What `start` may be told. Layers add to it. */
export interface StartOptions {
  /** The server of the instance, listening or not yet; a list where the instance listens at several
   *  places, of which the first one is judged. */
  server?: WebServer | WebServer[]
  /** The instance's port. Default: the server's; without a server, `PORT`. */
  port?: number
  /** Scheme, name, port and path at which the instance reaches itself. Default: `FTW_MONITOR_URL`,
   *  else the address that the server is bound to. Credentials in it are for our own requests,
   *  and are shown to nobody. */
  url?: string
  /** Where the monitor listens. Default: `FTW_MONITOR_LISTEN`, else port + 80 on the instance's
   *  host. */
  listen?: Endpoint
  /** `'socket'`: only who comes by a Unix socket is taken for somebody on this machine, since what
   *  forwards others to our ports runs here, too. Default: `FTW_MONITOR_LOCAL`, else all who come
   *  from an address of this machine. */
  local?: 'socket'
  /** Default: `console`. */
  logger?: Logger
}

/** Where the monitor listens, as `net.Server.address()` returns it; `false` where it does not. */
export type Address = net.AddressInfo | string | false

/** What `drain` may be told. */
export interface DrainOptions {
  /** What probers are told (default: `Draining`). */
  reason?: string
  /** How many red answers in a row make a balancer act: its own `fall` (default: 3). */
  fall?: number
  /** The longest wait in milliseconds (default: `FTW_MONITOR_TIMEOUT_MS`, else 25,000, since
   *  Kubernetes kills after 30 s). */
  timeoutMs?: number
  /** The shortest wait in milliseconds, for routers that do not probe, such as DNS (default:
   *  `FTW_MONITOR_MINIMUM_MS`, else 0). In a shutdown, within the time in which probers are
   *  told. */
  minimumMs?: number
}

/** What `shutdown` and `shutdownOnSignal` may be told, besides what `drain` may. */
export interface ShutdownOptions extends DrainOptions {
  /** Called at once, beside all the rest: for consumers of queues and schedulers, which are to take
   *  no more jobs. `signal` is the one that came, `undefined` for `shutdown()`. */
  onSignal?(shutdown: { signal: NodeJS.Signals | undefined }): unknown
  /** Called when no request is in flight any more: closes databases, says goodbye to WebSockets,
   *  which are ended a second after it was called. May return a promise. */
  cleanUp?(shutdown: { signal: NodeJS.Signals | undefined }): unknown
  /** For draining and the requests in flight together, in milliseconds (default:
   *  `FTW_MONITOR_TIMEOUT_MS`, else 25,000); what is in flight then is cut. Probers have all of it
   *  but 5 s to be told, or four fifths if that is more. */
  timeoutMs?: number
  /** For everything, in milliseconds (default: `timeoutMs` + 3,000, so below Kubernetes's 30 s).
   *  What takes longer is named in the log, and the process exits with 1. */
  exitAfterMs?: number
  /** For `shutdownOnSignal`: what to listen for (default: `SIGTERM` and `SIGINT`). */
  signals?: NodeJS.Signals[]
}

// --- Limits --------------------------------------------------------------------------------------

// Of the monitor and the instance
const PORT_OFFSET = 80 // as in ftw.monitor
const TICK_MS = 250 // of the one timer behind most limits; a warm-up is to abort within a second
const LISTEN_RETRY_MS = 1_000 // an old process may hold our port a little longer
const LOOKUP_MS = 900 // for a name: stop() does not wait for a resolver that hangs
const LISTEN_WARNING_MS = 10_000 // by then somebody awaits start(server) before listen()

// Of the application
const RECEIVING_MS = 5_000 // since the last byte of half a head: its client may be gone
const SHORT_TURN_MS = 0.2 // of the event loop: a turn with nothing to do takes a tenth of that
const FIRST_REQUEST_MS = 1_000 // since a connection came: a busy client may send only now
const REQUESTS_PER_SWEEP = 1_000 // of requests that have ended without an event, without a monitor

// Of the verdict
const ANSWER_MS = 900 // for a database or a check; Kubernetes waits for one second
const QUESTION_MS = 30_000 // until one is asked anew: a cut connection never answers
const REASON_MAX = 500 // characters; balancers show less

// Of the warm-up
const WARMUP_TOLD_MS = 60_000 // then it may hang; doubled, so that WARMUP_MS costs five lines
const WARMUP_MS = 30 * 60_000 // for one site; ftw.monitor allows as much for all of them
const WARMUP_RETRY_MS = 1_000 // doubled from try to try
const WARMUP_RETRY_MAX_MS = 30_000 // so that an instance is back soon after what it needs is back

// Of draining
const PROBER_ASKS = 3 // whoever asks less often within PROBER_MS is a person, not a balancer
const PROBER_MS = 65_000 // twice AWS's default of 30 s, and some delay
const PROBER_MEMORY = 16 // asks: several checks may come at once, and then none for a while
const PROBERS_MAX = 64 // nobody has that many balancers
const LOOKUPS_PER_TICK = 128 // an address costs a system call; under a flood, drain waits longer
const PAUSES_MISSED = 3 // of its own longest pauses, and a margin: then a prober is gone
const PAUSE_MARGIN_MS = 1_000
const QUIET_MS = 100 // without a request: a balancer must still read the last answer
const POLL_MS = 25 // how often draining and shutdown look whether they may go on
const QUIET_SAMPLES = 4 // in QUIET_MS: a busy event loop needs longer to read what has come

// Of a shutdown
const REQUESTS_MS = 5_000 // of timeoutMs, that requests have after the last prober
const TELLING_SHARE = 4 / 5 // of a short timeoutMs, at least
const SETTLE_MS = 2_000 // for a quiet moment, where nobody was told: traffic may never pause
const CALLBACKS_MS = 5_000 // for onSignal and cleanUp, which may wait for a shutdown() of their own
const OTHERS_MS = 5_000 // for whoever else listens for the signal
const INSIST_MS = 1_000 // one stop may arrive twice; a person who presses Ctrl-C again takes longer
const EXIT_MARGIN_MS = 3_000 // after timeoutMs: for WebSockets to end, and for cleanUp
const GOODBYE_MS = 1_000 // for cleanUp to say goodbye, and for a peer to answer it
const ALIVE_MS = 1_000 // for a process that is done to end by itself
const TIMER_MAX_MS = 2 ** 31 - 1 // what setTimeout takes
const MILLISECONDS_MAX = 7 * 86_400_000 // in the environment, and of idle connections: a week

// Of the log
const LOG_LINE_MAX = 2_000 // characters: a failure of each of many sites is in one line
const LOG_MS = 1_000 // between failures of one command, so that nobody can flood the host's log
const FAULT_LOG_MS = 60_000 // between faults of our own

// Of a connection
const LINE_MAX = 4_096 // bytes: more than any command needs, and little of the host's memory
const LINES_PER_TURN = 16 // of one connection, then all others and the application have theirs
const TURN_PAUSE_MS = 10 // between such turns, or one client could fill the time that is left
const REQUESTS_PER_CONNECTION = 100 // the same for HTTP, where Node.js takes all there are at once
const CONNECTIONS_MAX = 256 // of the usual 1,024 descriptors; the others are for the application
const SEND_MS = 60_000 // for a line or an HTTP head: people type
const SILENCE_MS = 15 * 60_000 // in interactive mode: people think
const COMMAND_MS = 30_000 // without a word: by then every prober has given up
const REPORT_MS = 10_000 // from word to word of a command that waits
const LINGER_MS = 5_000 // for a peer to close after us
const UNSENT_MAX = 1_048_576 // bytes of a reply that nobody has taken when more is to be written

// --- Copies of this file -------------------------------------------------------------------------

// A process may hold several copies: one that `FTW_MONITOR=auto` preloaded and one that the program
// imports, one that is imported and one that is required, one in each of two bundles. What one of
// them registers, the verdict of another one would not know. So the copy that is loaded first does
// the work of all.

/** Where the first copy leaves what it exports: on the global object, of which Jest gives each file
 *  of tests one of its own. The number is that of their list. */
const EXPORTS: unique symbol = Symbol.for('ftw-monitor.exports.1')

/** What this copy exports, by name. Each layer adds to it. */
const ownExports: Record<string, unknown> = { VERSION }

/** What the first copy exports, if this is another one. */
const firstExports = (globalThis as { [EXPORTS]?: Record<string, unknown> })[EXPORTS]
if (!firstExports) Reflect.defineProperty(globalThis, EXPORTS, { value: ownExports })

/** Wraps each export: offers the first copy's function in place of ours. */
function shared<Exported>(name: string, own: Exported): Exported {
  ownExports[name] = own
  return (firstExports?.[name] ?? own) as Exported
}

// --- The monitor and its life --------------------------------------------------------------------

// One monitor is current: `start` makes it, and after `stop` it is over. It holds one object for
// each concern, and decides when each of them begins and ends; these know it as the monitor that
// they were made for. The functions that are exported work on what is current: `monitor`,
// `currentShutdown` and `signals`, which are declared in the section "The module".

/** Starts the monitor: `start(server)`, `start([server, other])` where the instance listens at
 *  several places, `start({ server, … })`, or `start()`, which finds the server when it listens in
 *  this process: the one at `PORT`, or without `PORT` the first that serves requests (this needs
 *  the layer "unmodified programs"; the core alone rejects with a `TypeError`). Do not await it
 *  before `server.listen()`, since it waits for that. Resolves to the address at which the monitor
 *  listens, or, after one warning, to `false` where the environment does not allow it (an address
 *  in use is tried again) and after a signal. Where `FTW_MONITOR=auto` has started the monitor
 *  already, it goes on as it is, unless something else is wanted here. Rejects with a `TypeError`
 *  or `RangeError` for what the caller passed wrongly. */
export const start: (instance?: WebServer | WebServer[] | StartOptions) => Promise<Address> =
  shared('start', async (instance = {}) => {
    const options = toStartOptions(instance)
    const answer = monitor.answerStart(options)
    if (answer === 'refuse') {
      log('warn', 'is already started; call stop() first')
      return monitor.address
    }
    if (currentShutdown?.isRunning || signals.hasCome) {
      log('warn', 'does not start: the instance is shutting down')
      return false
    }
    if (answer === 'goOn') return monitor.started.promise
    currentShutdown = undefined

    monitor.unhookServers()
    monitor.forgetConnections()
    if (!monitor.isOff) void monitor.end()
    monitor = new Monitor(options)
    monitor.hookServers()
    if (isSwitchedOff('FTW_MONITOR')) return false
    return monitor.begin()
  })

/** Closes the monitor and its connections, aborts what runs, takes its hook off the server and,
 *  unless a shutdown has begun, its listeners off the signals. Resolves when the port is free. What
 *  was registered stays, and `start()` works again. */
export const stop: () => Promise<void> = shared('stop', async () => {
  const stopping = monitor
  if (!currentShutdown?.isRunning) {
    signals.release()
    stopping.unhookServers()
    stopping.forgetConnections()
    monitor = new Monitor({ servers: [], logger: stopping.logger })
  }
  await stopping.end()
})

//   new or stopped ── waiting ── booting ── accepting ── closed ── waiting
//   any of them ── stopped; any that runs ── failed

type MonitorState =
  | 'new' // no monitor was begun yet
  | 'stopped' // switched off, or over
  | 'failed' // it has given up for a wrong setting
  | 'waiting' // for the server to listen
  | 'booting' // the instance is known, and does not accept connections yet
  | 'accepting' // it does
  | 'closed' // its server is closed, and may listen again

/** Nothing is to be asked, nor to be waited for, unless `start` is called. */
const OFF = new Set<MonitorState>(['new', 'stopped', 'failed'])

/** The clock ticks; the port is open, or will be. The others are neither off nor running. */
const RUNNING = new Set<MonitorState>(['waiting', 'booting', 'accepting'])

/** What a layer adds to a monitor: it is made with the monitor, and told of its life. */
interface Extension {
  /** The monitor is hooked into the servers that `start` was given, or signals are listened for, or
   *  one has come: now others may matter, too. */
  findServers?(): void
  /** The hooks are taken off. */
  onUnhook?(): void
  /** The monitor begins its life. */
  onBegin?(): void
  /** The monitor begins to tick, or has ticked. */
  onTick?(): void
  /** The clock stops. */
  onClose?(): void
  /** The instance's server listens. */
  onListening?(): void
  /** The traffic has a server that it did not have before. */
  onServer?(traffic: Traffic, server: net.Server): void
  /** Sees an event of a server before all others. What is `taken` nobody else hears of; what is
   *  `uncounted` only the application does. */
  onEvent?(
    traffic: Traffic,
    server: net.Server,
    event: string,
    args: unknown[]
  ): 'taken' | 'uncounted' | undefined
  /** A request is over, with the status of its answer, or 0 where there was none. */
  onRequestEnd?(traffic: Traffic, request: RequestInFlight, statusCode: number): void
  /** Somebody has asked for the verdict so often that it may be a balancer. */
  onProber?(prober: Prober): void
  /** Whether something has to be found out before the verdict is told, and what finds it out. */
  readonly isInquiryDue?: boolean
  inquire?(): Promise<void>
  /** The verdict is told. */
  onVerdict?(verdict: Verdict): void
  /** Resolves when the warm-up after boot may begin, at once when the signal aborts. */
  prepareWarmup?(signal: AbortSignal): Promise<void>
}

/** At each event of a server and at each check, only those are called that have to do with it. */
class Extensions {
  readonly all: Extension[] = []
  readonly ofEvents: Extension[] = []
  readonly ofRequests: Extension[] = []
  readonly ofInquiries: Extension[] = []
  readonly ofVerdicts: Extension[] = []

  add(extension: Extension): void {
    this.all.push(extension)
    if (extension.onEvent) this.ofEvents.push(extension)
    if (extension.onRequestEnd) this.ofRequests.push(extension)
    if (extension.inquire) this.ofInquiries.push(extension)
    if (extension.onVerdict) this.ofVerdicts.push(extension)
  }

  /** What fails in a layer is our fault, and must not be the host's end. */
  tell(act: (extension: Extension) => void): void {
    for (const extension of this.all) attemptOwn(() => act(extension))
  }
}

/** What makes them. Layers add to it. */
const extensionMakers: ((owner: Monitor) => Extension)[] = []

class Monitor {
  state: MonitorState
  readonly logger: Logger
  readonly options: CheckedStartOptions
  readonly extensions = new Extensions()
  readonly traffic = new Traffic(this, this.extensions)
  /** What a shutdown closes and waits for. Extensions add what is never judged, counted or told
   *  of. */
  readonly allTraffic: Traffic[] = [this.traffic]
  readonly clock = new Clock()
  readonly probers = new Probers(this)
  warmup = new WarmupRunner(this)
  /** Known from `booting` on. */
  instance: InstanceAddress | undefined
  /** Whether nobody who comes by a port is on this machine. */
  isOnlySocketLocal = false
  listener: Listener | undefined
  draining: Draining | undefined
  /** What was told last. */
  toldVerdict = BOOTING
  /** Resolves to where it listens, or to `false` where it cannot, or not yet. */
  readonly started = deferred<Address>()
  #isHooked = false

  constructor(options: CheckedStartOptions, state: MonitorState = 'stopped') {
    this.state = state
    this.options = options
    this.logger = options.logger ?? console
    for (const make of extensionMakers) attemptOwn(() => this.extensions.add(make(this)))
  }

  get isOff(): boolean {
    return OFF.has(this.state)
  }

  get isRunning(): boolean {
    return RUNNING.has(this.state)
  }

  /** What start() does while this is the current monitor: begins another one if this one does not
   *  run, or found no port; else refuses. A layer may let it go on with this one. */
  answerStart: (options: CheckedStartOptions) => 'begin' | 'goOn' | 'refuse' = () => {
    const hasNoPort = this.instance !== undefined && this.listener === undefined
    return this.isRunning && !hasNoPort ? 'refuse' : 'begin'
  }

  get address(): Address {
    return this.listener?.address ?? false
  }

  /** The instance's server, also where its events cannot be seen. */
  get server(): net.Server | undefined {
    return this.traffic.server ?? this.options.servers[0]
  }

  /** Derived, since the server's `close` event comes only when its last request is gone. Before it
   *  has accepted, it boots. */
  get isInstanceClosing(): boolean {
    if (this.state !== 'accepting') return false
    const { server } = this
    return server ? !server.listening : this.instance?.isRefusing === true
  }

  begin(): Promise<Address> {
    this.extensions.tell((each) => each.onBegin?.())
    this.#wait()
    return this.started.promise
  }

  /** Ends this life; resolves when the port is free. The servers stay hooked. */
  end(state: 'stopped' | 'failed' = 'stopped'): Promise<void> {
    this.draining = undefined // clients go elsewhere all the same, if it is a shutdown that goes on
    const closed = this.#close(state)
    this.started.resolve(false)
    return closed
  }

  /** A wrong setting of a deployment costs a warning and the monitor, never the application. A
   *  health path stays red. */
  giveUp(error: unknown): void {
    log('warn', `${errorText(error)}; there is no monitor until a restart`)
    void this.end('failed')
  }

  /** Our own port cannot be had. With the server at hand, health() and the health path go on. */
  onListenFailed(error: unknown): void {
    if (!this.server) {
      this.giveUp(error)
      return
    }
    log('warn', `${errorText(error)}; nothing listens until a restart`)
    this.listener = undefined
    this.started.resolve(false)
  }

  /** Hooks into the servers that `start` was given. */
  hookServers(): void {
    if (!this.#isHooked) {
      for (const server of this.options.servers) this.traffic.add(server)
    }
    this.#isHooked = true
    this.findServers()
  }

  /** Has extensions find others, unless it was not started. */
  findServers(): void {
    if (!this.#isHooked) return
    this.extensions.tell((each) => each.findServers?.())
  }

  unhookServers(): void {
    this.#isHooked = false
    this.extensions.tell((each) => each.onUnhook?.())
    for (const traffic of this.allTraffic) traffic.unhook()
  }

  forgetConnections(): void {
    for (const traffic of this.allTraffic) traffic.forgetConnections()
  }

  /** Our own server listens. */
  onListening(address: net.AddressInfo | string): void {
    log('info', `listening on ${describeAddress(address)}`)
    this.started.resolve(address)
  }

  /** The instance's server listens. */
  onServerListening(server: net.Server): void {
    if (this.isOff || server !== this.server) return
    // A server may close, and listen elsewhere before its `close` event.
    if (this.instance?.hasMoved(boundAddress(this.options, server))) {
      void this.#close('closed')
    }
    this.extensions.tell((each) => each.onListening?.())
    if (this.state === 'closed') this.#wait()
    else this.#advance()
  }

  /** The monitor closes with the server, and comes back when that listens again. What an operator
   *  wanted still holds then, and so do the probers that a drain waits for. */
  onServerClose(server: net.Server): void {
    if (server !== this.server) return
    const wasServing = this.isInstanceClosing // one that never listened emits `close` too
    if (wasServing && !currentShutdown) void this.#close('closed')
  }

  /** Takes the instance out; where it is out already, changes how. Probers are told for so long at
   *  most. */
  beginDraining(options: Required<DrainOptions>, limitMs: number): Draining {
    if (this.draining) this.draining.change(options, limitMs)
    else this.draining = new Draining(this, options, limitMs)
    tellIfRed(this)
    this.traffic.sendClientsElsewhere()
    const { awaitedProbers, hasSomebodyToTell } = this.draining
    if (!hasSomebodyToTell || limitMs <= 0) return this.draining
    const probers = awaitedProbers.map(({ shownAddress, pace }) => `${shownAddress} (${pace})`)
    log('info', `drains: waits for ${probers.join(', ')}, at most ${limitMs / 1_000} s`)
    return this.draining
  }

  endDraining(): void {
    this.draining = undefined
    this.traffic.stopSendingElsewhere()
    if (!this.isOff) void inquireAndJudge()
  }

  #wait(): void {
    this.state = 'waiting'
    tellIfRed(this)
    this.extensions.tell((each) => each.onTick?.())
    this.clock.start(() => this.#tick())
    this.clock.schedule(LISTEN_WARNING_MS, () => {
      if (this.state === 'waiting') log('warn', 'waits for the server to listen')
    })
    this.#advance()
  }

  /** Takes the next steps towards accepting, as far as they can be taken now. */
  #advance(): void {
    const { server } = this
    if (!server?.listening) return
    if (this.state === 'waiting') this.open(boundAddress(this.options, server), server)
    this.accept()
  }

  /** Finds out how the instance is reached, and opens the monitor port beside it. The server is
   *  known, or else the instance is not seen to accept connections yet. */
  open(bound: Bound, server?: net.Server): void {
    try {
      this.isOnlySocketLocal = isOnlySocketLocal(this.options)
      const location = locateInstance(this.options, bound, server)
      if (!URL.canParse(location.url)) failWith(`cannot use ${location.url}: set FTW_MONITOR_URL`)
      this.instance = new InstanceAddress(location)
    } catch (error) {
      this.giveUp(error)
      return
    }
    this.state = 'booting'
    try {
      this.listener = new Listener(monitorEndpoint(this.options, bound), this)
      this.listener.open()
    } catch (error) {
      this.onListenFailed(error)
    }
  }

  /** The instance accepts connections. */
  accept(): void {
    if (this.state !== 'booting') return
    this.state = 'accepting'
    this.warmup.begin()
  }

  #tick(): void {
    this.probers.onTick()
    this.extensions.tell((each) => each.onTick?.())
    this.#advance()
    // A page that hangs in its warm-up would keep alive a process that has closed its server.
    if (this.isInstanceClosing) {
      this.warmup.abort('the instance is shutting down')
      tellIfRed(this)
    }
    this.listener?.enforceLimits()
    this.traffic.forgetEndedRequests() // with what their responses hold
    this.traffic.forgetClosedConnections()
  }

  /** Ends all that runs, at once; what may begin again begins anew. Resolves when the port is
   *  free. */
  #close(state: 'stopped' | 'failed' | 'closed'): Promise<void> {
    const { listener } = this
    if (listener?.isListening) log('info', 'closed')
    this.state = state
    tellIfRed(this)
    this.extensions.tell((each) => each.onClose?.())
    this.clock.stop()
    this.warmup.end()
    this.warmup = new WarmupRunner(this)
    this.instance = undefined
    this.listener = undefined
    return listener?.close() ?? Promise.resolve()
  }
}

const START_OPTIONS = ['server', 'port', 'url', 'listen', 'local', 'logger']

/** What checks the options that layers add. */
const optionChecks = new Map<string, (value: unknown) => void>()

/** What `start` was told; the first server is the instance. */
interface CheckedStartOptions extends Omit<StartOptions, 'server'> {
  servers: net.Server[]
}

function toStartOptions(instance: unknown): CheckedStartOptions {
  const isWithoutOptions = isServer(instance) || Array.isArray(instance)
  const options: unknown = isWithoutOptions ? { server: instance } : instance
  const names = [...START_OPTIONS, ...optionChecks.keys()]
  const whoTakes = 'start() takes an http.Server (app.listen() of Express, fastify.server), or'
  mustHaveOnly(options, names, whoTakes)

  const { server = [], ...others } = options as Record<string, unknown>
  const { port, url, listen, local = 'socket', logger = console } = others
  const servers: unknown[] = Array.isArray(server) ? server : [server]
  must(servers.every(isServer), 'server must be an http, https or http2 server, or a list of them')
  must(url === undefined || (typeof url === 'string' && toUrl(url)), `url ${URL_SENTENCE}`)
  must(listen === undefined || isEndpoint(listen), 'listen must be { host, port } or { path }')
  must(local === 'socket', "local must be 'socket'")
  must(hasMethods(logger, 'info', 'warn', 'error'), 'logger must have info, warn and error')
  if (port !== undefined) checkPort(port, listen)
  for (const [name, check] of optionChecks) check(others[name])
  must(servers.length >= serversNeeded, 'start() needs the server of the instance: start(server)')
  return { ...others, servers }
}

/** How many servers `start` has to be given. A layer that finds the instance's needs none. */
let serversNeeded = 1

function checkPort(port: unknown, listen: unknown): void {
  const Kind = typeof port === 'number' ? RangeError : TypeError
  must(isPort(port) && port > 0, `port ${PORT_SENTENCE}`, Kind)

  if (listen !== undefined || readEnv('FTW_MONITOR_LISTEN') !== undefined) return
  must(
    isPort(port + PORT_OFFSET),
    'the monitor belongs at port + 80, which is no port: say port or listen',
    RangeError
  )
}

/** https and http2 servers are no `http.Server`, but behave alike; a `net.Server` lacks
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

// --- The clock -----------------------------------------------------------------------------------

/** Counts time by ticks. It does not advance while the application blocks the event loop, so that
 *  clients are not blamed for that. One timer stands behind all that it is asked to do. */
class Clock {
  nowTickMs = 0
  readonly #dueAtTickMs = new Map<() => void, number>()
  #timer: ReturnType<typeof setInterval> | undefined

  /** Ticks from now on. */
  start(onTick: () => void): void {
    this.#timer = setInterval(() => this.#tick(onTick), TICK_MS).unref()
  }

  /** Forgets what it was asked to do; the time stays. */
  stop(): void {
    clearInterval(this.#timer)
    this.#dueAtTickMs.clear()
  }

  /** Does something after some time, unless it is stopped before. */
  schedule(afterMs: number, task: () => void): void {
    this.#dueAtTickMs.set(task, this.nowTickMs + afterMs)
  }

  cancel(task: () => void): void {
    this.#dueAtTickMs.delete(task)
  }

  #tick(onTick: () => void): void {
    this.nowTickMs += TICK_MS
    attemptOwn(onTick)
    for (const [task, dueAtTickMs] of this.#dueAtTickMs) {
      if (dueAtTickMs > this.nowTickMs) continue
      this.#dueAtTickMs.delete(task)
      attemptOwn(task)
    }
  }
}

// --- Addresses -----------------------------------------------------------------------------------

// Pure functions from options, environment and the bound address to where the instance is reached,
// and where the monitor listens.

/** What the instance is bound to; the address is '' where it is bound to none in particular. */
interface Bound {
  address: string
  port: number | undefined
  path: string | undefined
}

/** Returns the host at which this machine reaches what is bound to an address, or to all. */
function hostReaching(address: string): string {
  if (address === '') return 'localhost'
  if (address === '0.0.0.0') return '127.0.0.1'
  // A machine without IPv6 binds :: all the same, but has no ::1; `localhost` always works.
  return address === '::' ? 'localhost' : address
}

function boundAddress({ port }: { port?: number }, server: net.Server): Bound {
  const bound = server.address()
  if (typeof bound === 'string') return { address: '', port, path: bound }
  return { address: bound?.address ?? '', port: port ?? bound?.port, path: undefined }
}

/** Where the instance reaches itself. */
function locateInstance(
  { url }: CheckedStartOptions,
  { address, port, path }: Bound,
  server: net.Server | undefined
): Location {
  const host = hostReaching(address)
  const origin = `${server && isSecure(server) ? 'https' : 'http'}://${hostInUrl(host)}`
  const ownUrl = port ? `${origin}:${port}` : origin
  const givenUrl = url ?? readEnvAs('FTW_MONITOR_URL', toUrl, URL_SENTENCE)
  const plainUrl = givenUrl === undefined ? ownUrl : withoutCredentials(givenUrl)
  return { host, port, path, url: withoutSlashes(plainUrl) }
}

/** Nobody is to see them, and fetch refuses them there. */
function withoutCredentials(text: string): string {
  const url = new URL(text)
  if (url.username === '' && url.password === '') return text
  url.username = ''
  url.password = ''
  return url.href
}

/** Where the monitor is to listen. */
function monitorEndpoint({ listen }: CheckedStartOptions, bound: Bound): net.ListenOptions {
  const given = listen ?? endpointInEnvironment()
  // exclusive: the workers of a cluster would share the port, and answer for each other
  if (given.path !== undefined) return { exclusive: true, path: given.path }

  const host = given.host ?? bound.address
  const port = given.port ?? (bound.port ?? NaN) + PORT_OFFSET
  if (!isPort(port)) failWith('finds no port at the instance port + 80: set FTW_MONITOR_LISTEN')
  return { exclusive: true, port, host: host || undefined } // none is all addresses
}

function endpointInEnvironment(): Endpoint {
  return readEnvAs('FTW_MONITOR_LISTEN', toEndpoint, ENDPOINT_SENTENCE) ?? {}
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

const PORT_SENTENCE = 'must be a number from 1 to 65535'
const URL_SENTENCE = 'must be an http or https URL, without query'
const ENDPOINT_SENTENCE = 'must be PORT, HOST:PORT, or the path of a Unix socket'

function toUrl(text: unknown): string | undefined {
  const url = String(text)
  return /^https?:[^?#]+$/i.test(url) && URL.canParse(url) ? url : undefined
}

function hostInUrl(host: string): string {
  return net.isIPv6(host) ? `[${host}]` : host
}

// --- The address of the instance -----------------------------------------------------------------

/** Where the instance is reached. */
interface Location {
  host: string
  port: number | undefined
  /** Its Unix socket, if it is on one. */
  path: string | undefined
  /** Without credentials. */
  url: string
}

class InstanceAddress {
  /** At first that of its location. */
  url: string
  readonly location: Location
  /** Of an instance whose server is not known: whether somebody was refused a connection. */
  isRefusing = false

  constructor(location: Location) {
    this.location = location
    this.url = location.url
  }

  hasMoved({ address, port, path }: Bound): boolean {
    const { location } = this
    const isThere = port === location.port && path === location.path
    return !isThere || hostReaching(address) !== location.host
  }
}

// --- The listener --------------------------------------------------------------------------------

/** Our own port: opens it, tries again where the reason may pass, and holds the connections that
 *  came in by it. */
class Listener {
  readonly clock: Clock
  readonly #endpoint: net.ListenOptions
  readonly #monitor: Monitor
  /** A fixed number of places, since in a Set closed sockets lived longer. */
  readonly #sessions = Array<Session | undefined>(CONNECTIONS_MAX).fill(undefined)
  #connectionsSoFar = 0
  #server: net.Server | undefined
  /** Resolves when the server listens or cannot: Node.js looks up an address, too, before it
   *  listens. */
  #settled: Promise<void> = Promise.resolve()
  #isClosed = false

  constructor(endpoint: net.ListenOptions, monitor: Monitor) {
    this.#endpoint = endpoint
    this.#monitor = monitor
    this.clock = monitor.clock
  }

  /** Whoever reaches a Unix socket is on this machine. */
  get unixSocket(): string | undefined {
    return this.#endpoint.path
  }

  get isListening(): boolean {
    return this.#server?.listening === true
  }

  get address(): Address {
    return this.#server?.address() ?? false
  }

  open(isRetry = false): void {
    const server = net
      .createServer({ allowHalfOpen: true }, (socket) => this.#admit(socket))
      .unref()
    this.#server = server
    Reflect.defineProperty(server, MONITOR_SERVER, { value: true })
    this.#settled = new Promise((resolve) => {
      server.once('listening', () => resolve())
      server.once('error', () => resolve())
    })
    server.on('listening', () => this.#onListening(server))
    server.on('error', (error) => this.#onError(server, error, isRetry))
    try {
      server.listen(this.#endpoint)
    } catch (error) {
      server.emit('error', error) // thrown by Node.js where its permissions forbid listening
    }
  }

  /** Resolves when the port is free. While a name is looked up nothing listens: if that takes long,
   *  the port closes as soon as it opens. */
  async close(): Promise<void> {
    this.#isClosed = true
    for (const session of this.#sessions) session?.cutOff()

    const server = this.#server
    if (server?.listening) await new Promise((resolve) => server.close(resolve))
    else await Promise.race([this.#settled, unreffedPause(LOOKUP_MS)])
  }

  enforceLimits(): void {
    for (const session of this.#sessions) session?.enforceLimit()
  }

  /** Puts a session in its place: one of HTTP in that of the lines with which it began. */
  keep(session: Session): void {
    this.#sessions[session.place] = session
  }

  forget({ place, socket }: Session): void {
    if (this.#sessions[place]?.socket === socket) this.#sessions[place] = undefined
  }

  #onListening(server: net.Server): void {
    // It may have been closed while a name was looked up.
    if (this.#isClosed) server.close()
    else this.#monitor.onListening(server.address() ?? '')
  }

  #onError(server: net.Server, error: NodeJS.ErrnoException, isRetry: boolean): void {
    if (this.#isClosed || server.listening) return // it could not accept a connection

    const text = `cannot listen: ${errorText(error)}`
    const advice = PASSING_ERRORS.get(error.code)
    if (advice === undefined) {
      this.#monitor.onListenFailed(`${text}; set FTW_MONITOR_LISTEN`)
      return
    }
    if (!isRetry) void this.#tellOfRetries(text, advice)
    this.#monitor.started.resolve(false)
    this.clock.schedule(LISTEN_RETRY_MS, () => {
      // A look-up of a name cannot be called off, and the process would have to wait for it.
      if (!currentShutdown?.isRunning) this.open(true)
    })
  }

  /** The socket of a killed process stays, and only connecting tells it from one in use. */
  async #tellOfRetries(text: string, advice: string): Promise<void> {
    const { path } = this.#endpoint
    const isDead = path !== undefined && (await isNobodyAt(path))
    const deadAdvice = `nobody listens at ${path}: remove it before each start, as Node.js cannot`
    log('warn', `${text}; tries every second; ${isDead ? deadAdvice : advice}`)
  }

  #admit(socket: net.Socket): void {
    const free = this.#sessions.indexOf(undefined)
    const place = free >= 0 ? free : this.#makeRoom()
    this.#connectionsSoFar++
    openSession(this, socket, place, this.#connectionsSoFar)
  }

  /** Closes a connection of the address that has most of them: the longest idle one, else the
   *  oldest. */
  #makeRoom(): number {
    const sessions = this.#sessions.filter((session) => session !== undefined)
    const countByAddress = new Map<string | undefined, number>()
    for (const { remoteAddress } of sessions) {
      countByAddress.set(remoteAddress, (countByAddress.get(remoteAddress) ?? 0) + 1)
    }
    const most = Math.max(...countByAddress.values())
    const candidates = sessions.filter(
      ({ remoteAddress }) => countByAddress.get(remoteAddress) === most
    )
    const idle = candidates.filter(({ state }) => state !== 'running')
    idle.sort(
      (one, other) => one.stateSinceTickMs - other.stateSinceTickMs || one.number - other.number
    )
    candidates.sort((one, other) => one.number - other.number)
    const leaving = idle[0] ?? candidates[0]
    leaving?.cutOff()
    return leaving?.place ?? 0
  }
}

/** What marks the servers of monitors, which are no business of another one's. */
const MONITOR_SERVER: unique symbol = Symbol.for('ftw-monitor.server.1')

/** Whether connections to a Unix socket are refused. */
function isNobodyAt(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = net.connect({ path }).unref()
    const isKnown = (isNobody: boolean): void => {
      socket.destroy()
      resolve(isNobody)
    }
    socket.setTimeout(LOOKUP_MS, () => isKnown(false))
    socket.on('connect', () => isKnown(false))
    socket.on('error', (error: NodeJS.ErrnoException) => isKnown(error.code === 'ECONNREFUSED'))
  })
}

function describeAddress(address: net.AddressInfo | string): string {
  if (typeof address === 'string') return address
  return `${hostInUrl(address.address)}:${address.port}`
}

const NAME_ADVICE = 'the name may resolve later; else set FTW_MONITOR_LISTEN'

/** Errors that may go away, with advice if they do not. */
const PASSING_ERRORS = new Map<string | undefined, string>([
  ['EADDRINUSE', 'an older process may hold it; a cluster worker needs its own FTW_MONITOR_LISTEN'],
  ['EADDRNOTAVAIL', 'the address may come late to its interface; else set FTW_MONITOR_LISTEN'],
  ['EAI_AGAIN', NAME_ADVICE],
  ['ENOTFOUND', NAME_ADVICE]
])

// --- The traffic ---------------------------------------------------------------------------------

// The servers that `start` was given or that it found, and what passes through them: connections
// and requests. This section counts the requests in flight, sends clients elsewhere, and closes it
// all. It sees them even where there is no monitor, since a shutdown waits for them.

/** Whatever keeps a connection busy until its last byte is out: a request that is being served, or
 *  an upgrade that is not answered yet. */
interface RequestInFlight {
  startedAtMs: number
  /** Method and URL. */
  line: string
  client: Client
  /** Of an upgrade alone: whether the application has answered it. */
  isUpgradeAnswered?: () => boolean
}

/** An HTTP/2 session; its own type is in a module that we do not import. */
interface Http2Session extends NodeJS.EventEmitter {
  goaway(code: number, lastStreamId: number): void
  close(): void
  destroy(): void
  readonly socket?: { readonly remoteAddress?: string; readonly remotePort?: number }
  /** From `close()` on. */
  readonly closed: boolean
  /** Once it has closed and no stream is left, while its client may still keep the connection. */
  readonly destroyed: boolean
}

/** A request of HTTP/2. */
interface Http2Stream extends NodeJS.EventEmitter {
  readonly session?: Http2Session
  readonly headersSent: boolean
  readonly sentHeaders?: Record<string, unknown>
  readonly destroyed: boolean
  respond(headers: Record<string, unknown>): void
  end(body?: string): void
  destroy(): void
}

/** For how long nothing has happened, by the clock and in samples: several of those prove that a
 *  busy event loop has read meanwhile what came. */
class QuietPeriod {
  #sinceMs = performance.now()
  #samples = 0

  begin(): void {
    this.#sinceMs = performance.now()
    this.#samples = 0
  }

  /** Call it every POLL_MS, with whether something happens, or has happened since. */
  sample(isBusy: boolean): void {
    if (isBusy) this.begin()
    else this.#samples++
  }

  hasLasted(ms: number): boolean {
    return this.#samples >= QUIET_SAMPLES && performance.now() - this.#sinceMs >= ms
  }
}

/** What is known of a connection. `handshaking`: nothing, until its TLS handshake is over.
 *  `serving`: its requests. `upgraded`: that it belongs to the application, as a WebSocket's
 *  does. */
type ClientState = 'handshaking' | 'serving' | 'upgraded'

/** A connection, from its first moment to its last. */
class Client {
  /** The connection itself, below TLS and HTTP/2: when it closes, all is over. Of a session that
   *  came before its server was seen, only this is known. */
  readonly connection: net.Socket | Http2Session
  onClose: () => void = doNothing
  /** What requests come by: the socket, the TLS socket after its handshake, or the HTTP/2
   *  session. */
  peer: net.Socket | Http2Session
  state: ClientState
  /** Streams of HTTP/2 that were upgraded. */
  readonly upgradedStreams = new Set<Http2Stream>()
  requestsInFlight = 0
  /** Whether another request has been read, and is not seen yet. */
  #isMoreExpected = false
  /** Only the newest response may carry `Connection: close`, since Node.js drops whatever was
   *  pipelined behind such a response. */
  #newestResponse: object | undefined
  /** Whether an HTTP/2 session was told to go elsewhere. */
  #isSentElsewhere = false
  readonly #quiet = new QuietPeriod()
  /** A request that was answered before its body had come. */
  #lateBody: http.IncomingMessage | undefined
  /** What had been read when the last request was over: if it is more now, half a head has come.
   *  One that came in the same packet as that request is not seen. */
  #bytesReadAtLastEnd = 0
  /** What had been read when we looked last, and when we saw more of it. */
  #bytesReadBefore = 0
  #lastByteAtMs = performance.now()

  constructor(peer: net.Socket | Http2Session, state: ClientState) {
    this.peer = peer
    this.connection = peer
    this.state = state
  }

  /** Without its response where others may be behind it that we have not seen. */
  requestBegins(response?: object): void {
    this.requestsInFlight++
    this.#newestResponse = response
  }

  requestEnded(request?: http.IncomingMessage): void {
    this.requestsInFlight--
    this.#lateBody = request && isUploading(request) ? request : undefined
    this.#quiet.begin()
    this.#bytesReadAtLastEnd = this.#bytesRead
  }

  /** Call it every POLL_MS, before you ask whether it is quiet. */
  sampleQuiet(): void {
    this.#quiet.sample(this.isBusy)
  }

  isNewest(response: object): boolean {
    return this.#newestResponse === response && !this.#isMoreExpected
  }

  /** To be called while a request is announced: what has been read with it may hold the next one,
   *  and the application may answer at once. */
  expectMore(): void {
    this.#isMoreExpected = 'goaway' in this.peer ? false : hasMoreThanOneHead(this.peer)
    process.nextTick(() => {
      this.#isMoreExpected = false
    })
  }

  /** Tells the client of an HTTP/2 session to open no more streams. Those that it opens meanwhile
   *  are served; the session's own close() would refuse them. The best moment is when a stream has
   *  just come, since a Node.js client itself refuses what it opens before it has read this.
   *  Returns whether it was told just now, so that streams may still be on their way. */
  sendSessionElsewhere(): boolean {
    const { peer } = this
    if (this.#isSentElsewhere || !('goaway' in peer)) return false
    if ('deno' in process.versions) return false // it may crash then
    this.#isSentElsewhere = true
    this.#quiet.begin()
    attempt(() => peer.goaway(0, LAST_STREAM_ID))
    return true
  }

  /** Something is being received, served or sent. */
  get isBusy(): boolean {
    if (this.state === 'upgraded' || isDestroyed(this.peer)) return false
    if (this.requestsInFlight > 0) return true
    // A session that was told to close still sends what its server has pushed.
    if ('goaway' in this.peer) return this.peer.closed
    const { _httpMessage: response }: EarlierSocket = this.peer
    return Boolean(response) || this.#isReceiving() // its request may have come before we saw it
  }

  /** Nothing has happened for so long that no request can be on its way: sent just now, or waiting
   *  until a busy event loop reads it. */
  get isQuiet(): boolean {
    const graceMs = this.#newestResponse ? QUIET_MS : FIRST_REQUEST_MS
    return !this.isBusy && this.#quiet.hasLasted(graceMs)
  }

  get isUpgraded(): boolean {
    return this.state === 'upgraded' || this.upgradedStreams.size > 0
  }

  /** Ends it in the way of its protocol; what is being sent is still sent. */
  endGracefully(): void {
    const { peer } = this
    attempt(() => ('goaway' in peer ? peer.close() : peer.destroySoon()))
  }

  /** Cuts what is still being served; returns whether anything is. */
  cut(): boolean {
    if (!this.isBusy) return false
    attempt(() => this.peer.destroy())
    return true
  }

  destroy(): void {
    attempt(() => this.peer.destroy())
    attempt(() => this.connection.destroy()) // a session of HTTP/2 may leave it open
  }

  /** Part of a handshake, of a head, or of a body that nobody waited for has come, and its last
   *  byte lately. */
  #isReceiving(): boolean {
    const bytesRead = this.#bytesRead
    if (bytesRead !== this.#bytesReadBefore) {
      this.#bytesReadBefore = bytesRead
      this.#lastByteAtMs = performance.now()
    }
    if (this.#lateBody && !isUploading(this.#lateBody)) {
      this.#lateBody = undefined
      this.#bytesReadAtLastEnd = bytesRead
    }
    const isPartial = bytesRead > this.#bytesReadAtLastEnd || this.#lateBody !== undefined
    const isReceiving = isPartial || this.state === 'handshaking'
    return isReceiving && performance.now() - this.#lastByteAtMs < RECEIVING_MS
  }

  get #bytesRead(): number {
    return 'bytesRead' in this.peer ? this.peer.bytesRead : 0
  }
}

const LAST_STREAM_ID = 2 ** 31 - 1 // so that none is refused

type ServerObserver = Pick<Monitor, 'onServerListening' | 'onServerClose'>

class Traffic {
  requests = 0
  errors = 0
  readonly #observer: ServerObserver
  readonly #extensions: Extensions
  /** All that serve requests, each with the function that takes the hook off; the first one is the
   *  instance. */
  readonly #unhooks = new Map<net.Server, () => void>()
  readonly #stoppedServers = new Set<net.Server>()
  /** Each connection, by what its requests come by. */
  readonly #clients = new Map<object, Client>()
  /** By response; by stream where it is HTTP/2, by socket where it is an upgrade. */
  readonly #inFlight = new Map<object, RequestInFlight>()
  #connectionsSoFar = 0
  /** The last socket that was announced as one of HTTP/2. */
  #newestCarrier: net.Socket | undefined
  /** Of HTTP/1. Who answers asks it at that moment, since a drain may have ended meanwhile. */
  isSendingElsewhere = false
  #isSendingSessionsElsewhere = false
  /** `refusing`: accepts no connection. `closing`: closes those that are quiet, too. `over`: what
   *  stands in for a server keeps no process alive. */
  #state: 'open' | 'refusing' | 'closing' | 'over' = 'open'
  /** One listener for all responses: a closure for each would cost more than all the rest here. */
  readonly #onResponseClose: (this: http.ServerResponse) => void

  constructor(observer: ServerObserver, extensions: Extensions) {
    this.#observer = observer
    this.#extensions = extensions
    const requestEnded = (response: http.ServerResponse): void => {
      attemptOwn(() => this.#requestEnded(response, response.statusCode, response.req))
    }
    this.#onResponseClose = function onResponseClose() {
      requestEnded(this)
    }
  }

  /** The one that is judged, if `start` was given any. */
  get server(): net.Server | undefined {
    const [first] = this.#unhooks.keys()
    return first
  }

  get servers(): net.Server[] {
    return [...this.#unhooks.keys()]
  }

  get clients(): Client[] {
    return [...this.#clients.values()]
  }

  /** Whether requests that come by this peer are of a client that is known. */
  knows(peer: object): boolean {
    return this.#clients.has(peer)
  }

  has(server: net.Server): boolean {
    return this.#unhooks.has(server)
  }

  /** A server whose events cannot be seen is left out, with a warning. */
  add(server: net.Server): void {
    if (this.has(server)) return
    const unhook = hookEmit(server, this)
    if (!unhook) {
      log('warn', 'cannot see the requests of a server whose emit is not configurable')
      return
    }
    this.#unhooks.set(server, unhook)
    this.#extensions.tell((each) => each.onServer?.(this, server))
    if (this.#state !== 'open') this.#stopServer(server)
  }

  get requestsInFlight(): number {
    this.forgetEndedRequests()
    return this.#inFlight.size
  }

  /** Connections of WebSockets and the like: no request is in flight there. */
  get upgradedConnections(): number {
    this.forgetEndedRequests()
    let count = 0
    for (const { state, upgradedStreams } of this.#clients.values()) {
      count += state === 'upgraded' ? 1 : upgradedStreams.size
    }
    return count
  }

  /** What is being served, the oldest first. */
  get openRequests(): Iterable<RequestInFlight> {
    this.forgetEndedRequests()
    return this.#inFlight.values()
  }

  /** Takes the hook off a server. */
  remove(server: net.Server): void {
    this.#unhooks.get(server)?.()
    this.#unhooks.delete(server)
  }

  /** Takes all hooks off. Connections stay known: a shutdown that follows may have to end them. */
  unhook(): void {
    for (const server of this.servers) this.remove(server)
  }

  forgetConnections(): void {
    for (const client of this.#clients.values()) this.#forgetClient(client)
  }

  /** For an application that takes our listeners off: to be called now and then. */
  forgetClosedConnections(): void {
    for (const client of this.#clients.values()) {
      if (isDestroyed(client.connection)) this.#forgetClient(client)
    }
  }

  /** Some responses never get their 'close', and an answered upgrade has no event. */
  forgetEndedRequests(): void {
    for (const [key, { client, isUpgradeAnswered }] of this.#inFlight) {
      if (isUpgradeAnswered?.()) {
        attemptOwn(() => this.#requestEnded(key, 0))
        if (key === client.peer) client.state = 'upgraded'
        else client.upgradedStreams.add(key as Http2Stream)
        continue
      }
      const isAlive = attempt(() => !isDestroyed(client.peer) && !isDestroyed(key))
      // Nor wait for what cannot be looked at.
      if (!isAlive) attemptOwn(() => this.#requestEnded(key, 0))
    }
  }

  // What the hooks see

  /** Sees each event of a server before the application does; returns whether that is not to hear
   *  of it. */
  onEvent(server: net.Server, event: string, args: unknown[]): boolean {
    try {
      for (const extension of this.#extensions.ofEvents) {
        const outcome = extension.onEvent?.(this, server, event, args)
        if (outcome) return outcome === 'taken'
      }
    } catch (error) {
      logFault(error) // what failed is in a layer: it is counted all the same
    }
    this.#count(server, event, args)
    return false
  }

  #count(server: net.Server, event: string, args: unknown[]): void {
    switch (event) {
      case 'request':
      case 'checkContinue':
      case 'checkExpectation':
        return this.#onRequest(args[0] as http.IncomingMessage, args[1] as http.ServerResponse)
      case 'stream':
        return this.#onStream(args[0] as Http2Stream, args[1] as http.IncomingHttpHeaders)
      case 'upgrade':
      case 'connect':
        return this.#onUpgrade(args[0] as http.IncomingMessage, args[1] as net.Socket)
      case 'listening':
        return this.#onListening(server)
      case 'close':
        return this.#observer.onServerClose(server)
      case 'connection':
        return this.#onConnection(server, args[0] as net.Socket)
      case 'secureConnection':
        return this.#onSecureConnection(server, args[0] as SecureSocket)
      case 'session':
        return this.#onSession(args[0] as Http2Session)
    }
  }

  /** A server that begins to listen after the signal is closed before it accepts. */
  #onListening(server: net.Server): void {
    if (this.#state !== 'open') this.#stopServer(server)
    else this.#observer.onServerListening(server)
  }

  #onConnection(server: net.Server, socket: net.Socket): void {
    this.#connectionsSoFar++
    if (!isSecure(server) && speaksHttp2(server, socket)) this.#newestCarrier = socket
    this.addClient(new Client(socket, isSecure(server) ? 'handshaking' : 'serving'))
  }

  #onSecureConnection(server: net.Server, socket: SecureSocket): void {
    if (speaksHttp2(server, socket)) this.#newestCarrier = socket
    this.#clientOf(socket)
  }

  /** `session` is emitted while the connection that carries it is announced. */
  #onSession(session: Http2Session): void {
    const client = this.#clients.get(this.#newestCarrier ?? session)
    this.#newestCarrier = undefined
    if (client) this.moveClient(client, session)
    else this.addClient(new Client(session, 'serving'))
  }

  /** Where the peer is a TLS socket, the socket below may be known. */
  #clientOf(peer: SecureSocket | Http2Session): Client {
    const known = this.#clients.get(peer)
    if (known) return known
    const below = 'goaway' in peer ? undefined : this.#clients.get(peer._parent ?? peer)
    if (!below) return this.addClient(new Client(peer, 'serving'))
    this.moveClient(below, peer)
    return below
  }

  addClient(client: Client): Client {
    const { peer } = client
    if (isDestroyed(peer)) return client // its 'close' is past
    this.#clients.set(peer, client)
    client.onClose = () => this.#forgetClient(client)
    const emitter: NodeJS.EventEmitter = client.connection
    emitter.on('close', client.onClose)
    return client
  }

  #forgetClient(client: Client): void {
    this.#clients.delete(client.peer)
    const emitter: NodeJS.EventEmitter = client.connection
    attempt(() => emitter.off('close', client.onClose)) // it may be anything
  }

  /** From now on its requests come by another peer. */
  moveClient(client: Client, peer: net.Socket | Http2Session): void {
    this.#clients.delete(client.peer)
    client.peer = peer
    client.state = 'serving'
    this.#clients.set(peer, client)
  }

  /** The application may emit `request` with anything: what comes by no connection is its own. */
  #onRequest(request: http.IncomingMessage, response: http.ServerResponse): void {
    if (!isRequest(request, response)) return
    const { method, url, socket } = request
    const { stream } = response as { stream?: Http2Stream }
    if (this.#inFlight.has(response) || (stream && this.#inFlight.has(stream))) return

    response.on('close', this.#onResponseClose)
    const client = this.#clientOf(stream?.session ?? socket)
    this.#requestBegins(response, `${method} ${url}`, client)
    if (this.isSendingElsewhere) sendElsewhere(response, client, this)
  }

  /** A request of HTTP/2, for which `request` may not be emitted. */
  #onStream(stream: Http2Stream, headers: http.IncomingHttpHeaders): void {
    const { session } = stream
    if (!session) return
    const { ':method': method, ':path': path } = headers
    const client = this.#clientOf(session)
    stream.once('close', () => {
      client.upgradedStreams.delete(stream)
      attemptOwn(() => this.#requestEnded(stream, Number(stream.sentHeaders?.[':status'] ?? 0)))
    })
    this.#requestBegins(stream, `${String(method)} ${String(path)}`, client)
    if (method === 'CONNECT') this.#awaitUpgrade(stream, () => stream.headersSent)
    if (this.#isSendingSessionsElsewhere) client.sendSessionElsewhere()
  }

  /** For what a layer answers itself: it is not counted, but its connection is busy until then. */
  keepBusy(peer: net.Socket | Http2Session, response: http.ServerResponse | Http2Stream): void {
    const client = this.#clientOf(peer)
    const answer: NodeJS.EventEmitter = response
    client.requestBegins(response)
    answer.once('close', () => client.requestEnded('req' in response ? response.req : undefined))
    if (this.isSendingElsewhere) sendElsewhere(response, client, this)
    if (this.#isSendingSessionsElsewhere) client.sendSessionElsewhere()
  }

  /** Until the application answers, it is a request like any other. */
  #onUpgrade(request: http.IncomingMessage, socket: net.Socket): void {
    if (!isObject(request) || !isPeer(socket)) return
    if ('stream' in socket) return // a response of HTTP/2, whose stream is known
    const { method, url } = request
    const { bytesWritten } = socket
    this.#requestBegins(socket, `${method} ${url}`, this.#clientOf(socket))
    this.#awaitUpgrade(socket, () => socket.bytesWritten > bytesWritten)
  }

  #awaitUpgrade(key: object, isUpgradeAnswered: () => boolean): void {
    const request = this.#inFlight.get(key)
    if (request) request.isUpgradeAnswered = isUpgradeAnswered
  }

  /** Waits for a request that began before its server was known; it is not counted. */
  adopt(response: http.ServerResponse, client: Client): void {
    const line = `${response.req.method} ${response.req.url}`
    response.on('close', this.#onResponseClose)
    this.#inFlight.set(response, { startedAtMs: performance.now(), line, client })
    client.requestBegins()
  }

  #requestBegins(key: object, line: string, client: Client): void {
    this.#inFlight.set(key, { startedAtMs: performance.now(), line, client })
    client.requestBegins(key)
    this.requests++
    if (this.requests % REQUESTS_PER_SWEEP === 0) this.forgetEndedRequests() // where nothing ticks
  }

  #requestEnded(key: object, statusCode: number, upload?: http.IncomingMessage): void {
    const request = this.#inFlight.get(key)
    if (!request) return
    this.#inFlight.delete(key)
    request.client.requestEnded(upload)
    if (statusCode >= 500) this.errors++
    for (const extension of this.#extensions.ofRequests) {
      extension.onRequestEnd?.(this, request, statusCode)
    }
  }

  // The end of the application

  /** From now on each client of HTTP/1 is to go elsewhere with its next request. */
  sendClientsElsewhere(): void {
    this.isSendingElsewhere = true
    for (const [key, { client, isUpgradeAnswered }] of this.#inFlight) {
      if (!isUpgradeAnswered) sendElsewhere(key, client, this)
    }
  }

  /** The same for HTTP/2, where each session is told once, with its next stream, when all probers
   *  know: a balancer that still sends requests here would open new sessions again and again. */
  sendSessionsElsewhere(): void {
    this.#isSendingSessionsElsewhere = true
  }

  stopSendingElsewhere(): void {
    this.isSendingElsewhere = false
    this.#isSendingSessionsElsewhere = false
  }

  /** Refuses new connections, where the runtime can. From then on those that are quiet close. */
  async beginClosing(limitMs: number): Promise<void> {
    this.#state = 'refusing'
    for (const server of this.servers) acceptNoMore(server)
    if (this.servers.length > 0) await this.#untilNoneConnects(Math.min(limitMs, SETTLE_MS))
    const stops = this.servers.map((server) => this.#stopServer(server))
    await withinLimit(Promise.all(stops), limitMs).catch(doNothing)
    this.#state = 'closing'
  }

  /** Whether an answer has been written that is not taken yet. */
  get isSending(): boolean {
    return [...this.#inFlight.keys()].some((key) => 'writableEnded' in key && key.writableEnded)
  }

  /** The kernel resets what it has accepted and the event loop has not: of 60 requests that came
   *  while the event loop was busy, 54 to 59 were lost. A turn looks for connections at its
   *  beginning, so a short one has left little time for another connection. */
  async #untilNoneConnects(limitMs: number): Promise<void> {
    const startedAtMs = performance.now()
    let quietTurns = 0
    while (quietTurns < 2 && performance.now() - startedAtMs < limitMs) {
      const connectionsBefore = this.#connectionsSoFar
      const isShort = await isTurnShort()
      const isQuiet = this.#connectionsSoFar === connectionsBefore && isShort
      quietTurns = isQuiet ? quietTurns + 1 : 0
    }
  }

  /** Closes each connection as soon as it is quiet. Call it every POLL_MS; returns whether all
   *  requests are over, and no connection is left by which another one may come. */
  closeQuietConnections(): boolean {
    const areRequestsOver = this.requestsInFlight === 0
    if (this.#state !== 'closing') return areRequestsOver // somebody may always connect
    let areAllQuiet = true
    for (const client of this.#clients.values()) {
      if (isDestroyed(client.peer)) continue
      client.sampleQuiet()
      const isToEnd = client.isQuiet && !client.isUpgraded
      if (isToEnd && !client.sendSessionElsewhere()) client.endGracefully()
      if (!client.isQuiet) areAllQuiet = false // perhaps since it was just told to end
    }
    return areRequestsOver && areAllQuiet
  }

  /** Whether no connection is left but those that were upgraded. */
  get isDisconnected(): boolean {
    return [...this.#clients.values()].every(({ isUpgraded }) => isUpgraded)
  }

  /** Cuts what is still being served; returns how many requests that were. */
  cutRequests(): number {
    let count = this.requestsInFlight
    for (const client of this.#clients.values()) {
      const { requestsInFlight } = client
      const isCut = client.cut()
      if (isCut && requestsInFlight === 0) count++ // half a head
    }
    return count
  }

  /** Whether the application is still to hear that a connection was cut. */
  get isCutting(): boolean {
    return [...this.#clients.values()].some(({ peer }) => isDestroyed(peer))
  }

  /** Ends all connections that were not upgraded. */
  endConnections(): void {
    for (const client of this.#clients.values()) {
      if (!client.isUpgraded) client.destroy()
    }
  }

  /** At its end destroys all that is left: Fastify's and Nest's close() would wait for ever. */
  async endUpgraded(): Promise<void> {
    await pollUntil(() => this.upgradedConnections === 0, GOODBYE_MS)
    for (const { state, peer, upgradedStreams } of this.#clients.values()) {
      for (const stream of upgradedStreams) attempt(() => stream.end())
      if (state === 'upgraded' && !('goaway' in peer)) attempt(() => peer.end())
    }
    await pollUntil(() => this.upgradedConnections === 0, GOODBYE_MS)
    for (const client of this.#clients.values()) {
      for (const stream of client.upgradedStreams) attempt(() => stream.destroy())
      client.destroy()
    }
  }

  /** Lets the process end though the stand-ins of these servers are still open, also that of one
   *  which begins to listen now. */
  unrefServers(): void {
    this.#state = 'over'
    for (const server of this.#stoppedServers) server.unref()
  }

  /** Closes what has stopped listening, unless the program has done so. */
  closeServers(): void {
    for (const server of this.#stoppedServers) closeStandIn(server)
  }

  #stopServer(server: net.Server): unknown {
    this.#stoppedServers.add(server)
    const stopped = stopListening(server, this)
    if (this.#state === 'over') server.unref()
    return stopped
  }
}

/** Sees all events of a server. Returns a function that takes the hook off, or undefined if `emit`
 *  cannot be replaced. */
function hookEmit(server: net.Server, traffic: Traffic): (() => void) | undefined {
  return replaceMethod(server, 'emit', (innerEmit) => {
    return function emit(this: net.Server, event: string, ...args: unknown[]): boolean {
      const isTaken = attemptOwn(() => traffic.onEvent(server, event, args))
      if (isTaken) return true
      return Reflect.apply(innerEmit, this, [event, ...args])
    }
  })
}

/** Node.js keeps at a connection the response that is being served, and what parses HTTP, which an
 *  upgrade takes off. */
type EarlierSocket = net.Socket & { _httpMessage?: http.ServerResponse | null; parser?: unknown }

/** Whether something follows the first head in what Node.js is just taking apart. */
function hasMoreThanOneHead({ parser }: EarlierSocket): boolean {
  const { getCurrentBuffer }: { getCurrentBuffer?: () => Buffer } = Object(parser)
  const read = attempt(() => getCurrentBuffer?.call(parser))
  const endsAt = read?.indexOf(END_OF_HEAD) ?? -1
  return read !== undefined && endsAt >= 0 && endsAt + END_OF_HEAD.length < read.length
}

const END_OF_HEAD = '\r\n\r\n'

/** With the socket below TLS. */
type SecureSocket = net.Socket & { alpnProtocol?: unknown; _parent?: net.Socket }

function isSecure(server: net.Server): boolean {
  return 'setSecureContext' in server
}

/** A connection without TLS has no `alpnProtocol`. */
function speaksHttp2(server: net.Server, socket: net.Socket & { alpnProtocol?: unknown }): boolean {
  return 'updateSettings' in server && (socket.alpnProtocol ?? 'h2') === 'h2'
}

function isPeer(value: unknown): boolean {
  return hasMethods(value, 'once', 'destroy')
}

function isRequest(request: http.IncomingMessage | undefined, response: unknown): boolean {
  return isPeer(request?.socket) && hasMethods(response, 'on')
}

function isDestroyed(peer: object): boolean {
  return 'destroyed' in peer && peer.destroyed === true
}

// --- Servers that stop listening -----------------------------------------------------------------

// A server stops listening when its kernel handle is closed. The server keeps a stand-in for that
// handle: to the program it listens until the program itself closes it, and then all of Node.js's
// own code runs, with its callbacks and events. What `net.Server` asks of its handle is not
// documented, but has been the same on Node.js 20 to 26.

/** What a server asks of its handle, and we of it. */
interface Handle {
  close(onClosed?: () => void): void
  ref?(): void
  unref?(): void
  hasRef?(): boolean
  /** Fills the object in. A Unix socket has no such method. */
  getsockname?(address: object): number
  listen?(backlog: number): number
  /** Of a Unix socket. */
  bind?(path: string): number
}

type ServerWithHandle = net.Server & {
  _handle?: Handle | null
  _connectionKey?: string
  _pipeName?: string | null
}

/** What stands in for a handle, made beforehand: whatever connects between our last look and the
 *  close is reset. A stand-in stands for itself. */
const standIns = new WeakMap<Handle, Handle>()

/** How a server stops listening: at once, or when what this returns is resolved. A layer may put
 *  another way in its place, for a runtime whose servers have no handle. */
let stopListening: (server: net.Server, traffic: Traffic) => unknown = putStandIn

function putStandIn(server: ServerWithHandle): void {
  if (!server.listening) return
  const { _handle: handle, _pipeName: path } = server
  if (!handle) {
    // The server's own close() might cut connections whose answer is not taken yet.
    attempt(() => Reflect.apply(methodOf(net.Server.prototype, 'close'), server, []))
    return
  }
  const standIn = standInFor(handle)
  if (standIn === handle) return
  const keepsAlive = handle.hasRef?.() !== false
  server._handle = standIn
  // Whoever was given the socket meanwhile has its backlog back.
  if (hasSocketOfItsOwn(handle, server)) attempt(() => handle.listen?.(BACKLOG))
  attempt(() => handle.close())
  if (keepsAlive) standIn.ref?.()
  // The file of a Unix socket has gone with that; the program may look for it, or remove it.
  if (path) attempt(() => standIn.bind?.(path))
  // In a cluster, that closes what it knows.
  if (isOfCluster(handle)) process.once('disconnect', () => closeStandIn(server))
}

/** From its `ref()` on it keeps the process alive, as the listening server did. */
function standInFor(handle: Handle): Handle {
  const known = standIns.get(handle)
  if (known) return known
  const address = {}
  handle.getsockname?.(address)
  const keepAlive = setInterval(doNothing, TIMER_MAX_MS).unref()

  const standIn = unopenedLike(handle)
  const close = methodOf(standIn, 'close')
  standIn.close = (onClosed) => {
    clearInterval(keepAlive)
    Reflect.apply(close, standIn, [onClosed])
  }
  standIn.ref = () => void keepAlive.ref()
  standIn.unref = () => void keepAlive.unref()
  standIn.hasRef = () => keepAlive.hasRef()
  if (handle.getsockname) {
    standIn.getsockname = (out) => {
      for (const [name, value] of Object.entries(address)) Reflect.set(out, name, value)
      return 0
    }
  }
  standIns.set(handle, standIn).set(standIn, standIn)
  return standIn
}

/** Of the same kind, since Node.js gives handles to code of its own that takes nothing else: a
 *  plain object there ended the process. The symbols tell whose it is. */
function unopenedLike(handle: Handle): Handle {
  const isPlain = handle.constructor === Object // as in a cluster that shares the connections out
  const Kind = handle.constructor as new (type: number) => Handle
  const unopened = isPlain ? undefined : attempt(() => new Kind(HANDLE_OF_SERVER))
  if (!unopened) return { close: (onClosed) => onClosed && setImmediate(onClosed) }
  for (const key of Object.getOwnPropertySymbols(handle)) {
    Reflect.set(unopened, key, Reflect.get(handle, key))
  }
  return unopened
}

const HANDLE_OF_SERVER = 1 // as Node.js calls it, for TCP and for Unix sockets
const BACKLOG = 511 // as Node.js asks for where the program does not

/** Closes a server that has stopped listening, unless the program has. */
function closeStandIn(server: net.Server): void {
  if (server.listening) attempt(() => server.close())
}

/** Tells the kernel to accept no more connections for us: clients that come now keep trying, and
 *  are refused when the server closes. Node.js has no public way to do this; if it fails, a few
 *  more connections may be reset. */
function acceptNoMore(server: ServerWithHandle): void {
  const { _handle: handle } = server
  const isListening = handle && standInFor(handle) !== handle
  if (isListening && hasSocketOfItsOwn(handle, server)) attempt(() => handle.listen?.(0))
}

/** Whether nobody else accepts connections by the server's socket: then what waits there is ours. A
 *  socket is shared if it was inherited (`listen({ fd })`), if it came over IPC, or in a cluster.
 *  Where that cannot be told, it may be shared. */
function hasSocketOfItsOwn(handle: Handle, { _connectionKey: key }: ServerWithHandle): boolean {
  return !isOfCluster(handle) && key !== undefined && OWN_SOCKET.test(key)
}

/** Which puts a `close` of its own on the handle. */
function isOfCluster(handle: Handle): boolean {
  return Object.hasOwn(handle, 'close')
}

/** By this Node.js tells the sockets apart that it has opened; others have no address in it. */
const OWN_SOCKET = /^(?:[46]:.*:\d+|-1:.*[/\\].*:-1)$/ // 4:127.0.0.1:8080, -1:/run/app.sock:-1

// --- Sending clients elsewhere -------------------------------------------------------------------

// While the instance drains, a keep-alive client is to send its next request elsewhere. All else
// that the application answers stays as it is, byte for byte.

/** Responses that close their connection already: each `drain` comes by them again. */
const sentElsewhere = new WeakSet<object>()

function sendElsewhere(key: object, client: Client, traffic: Traffic): void {
  if ('goaway' in client.peer) return
  const response = key as http.ServerResponse
  attempt(() => {
    if (sentElsewhere.has(response) || response.headersSent) return
    sentElsewhere.add(response)
    client.expectMore()
    closeConnectionAfter(response, client, traffic)
  })
}

/** If we set a header, `writeHead` would treat the application's own in another way. So we
 *  only take the keep-alive away, and replace a `Connection: keep-alive` that the application
 *  has set. */
function closeConnectionAfter(
  response: http.ServerResponse,
  client: Client,
  traffic: Traffic
): void {
  const { shouldKeepAlive, req: request } = response
  // At once, since some call the prototype's own writeHead.
  const isSetAtOnce = !isUploading(request)
  if (isSetAtOnce) response.shouldKeepAlive = false

  replaceMethod(response, 'writeHead', (innerWriteHead) => {
    return function writeHead(this: http.ServerResponse, ...args: unknown[]): http.ServerResponse {
      const isLast = client.isNewest(response)
      if (!traffic.isSendingElsewhere || !isLast || isUploading(request)) {
        if (isSetAtOnce) response.shouldKeepAlive = shouldKeepAlive
        return Reflect.apply(innerWriteHead, this, args as [number])
      }
      response.shouldKeepAlive = false
      attempt(() => replaceKeepAliveSet(this))
      return Reflect.apply(innerWriteHead, this, args.map(withoutKeepAlive) as [number])
    }
  })
}

/** A client that still sends its body would see the connection break, and never read the answer. */
function isUploading({ complete, headers = {} }: Partial<http.IncomingMessage>): boolean {
  if (complete) return false
  return 'transfer-encoding' in headers || Number(headers['content-length'] ?? 0) > 0
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

// --- The verdict ---------------------------------------------------------------------------------

/** Whether this instance may be sent requests, and if not, why. */
interface Verdict {
  healthy: boolean
  state: VerdictState
  /** `warn` if it will pass by itself, `fail` if something is broken. */
  grade: Grade
  /** `OK`, or what anybody may know of why not. */
  reason: string
  /** The same for this machine: what a database or a performer threw, too. */
  explanation: string
  /** The explanation for the log, without the `Error:` by which programs know a fault. */
  cause: string
}

type Grade = 'pass' | 'warn' | 'fail'

const VERDICT_STATES = [
  'healthy',
  'booting',
  'warming_up',
  'warmup_failed',
  'dependency_failed', // a database or a check
  'draining',
  'shutting_down',
  'gave_up'
] as const

type VerdictState = (typeof VERDICT_STATES)[number]

const HEALTHY = verdictOf('healthy', 'pass', 'OK')
const WARMUP_FAILED = 'Warmup failed'
const BOOTING = verdictOf('booting', 'warn', 'Instance is booting')
const WARMING_UP = verdictOf('warming_up', 'warn', 'Warmup in progress')
const SHUTTING_DOWN = verdictOf('shutting_down', 'warn', 'Instance is shutting down')
const GAVE_UP = verdictOf('gave_up', 'fail', 'Error: the monitor gave up')

/** A verdict of which anybody may know all. */
function verdictOf(state: VerdictState, grade: Grade, reason: string): Verdict {
  return { healthy: grade === 'pass', state, grade, reason, explanation: reason, cause: reason }
}

/** Tells whether this instance may be sent requests: reason `OK`, or why not, in one line that
 *  never contains `OK`. Answers within a second, or two where a check is registered meanwhile, and
 *  never rejects. With `FTW_MONITOR=0`, which is for emergencies, nothing is asked, and it is
 *  healthy until it shuts down. */
export const health: () => Promise<{ healthy: boolean; reason: string }> = shared(
  'health',
  async () => {
    const { healthy, explanation } = await inquireAndJudge()
    return { healthy, reason: explanation }
  }
)

/** Judges by what is known, and does nothing else; `inquire` comes before it. */
function judge(): Verdict {
  const { draining, state, isInstanceClosing } = monitor
  if (draining) return verdictOf('draining', 'warn', toRedLine(draining.reason))
  if (currentShutdown || isInstanceClosing || state === 'closed') return SHUTTING_DOWN
  if (state === 'failed') return GAVE_UP
  if (isWithoutMonitor()) return HEALTHY

  const broken = firstBroken()
  const isJustCold = broken?.isCold === true
  if (broken && !isJustCold) {
    return fault('dependency_failed', broken.sentence(false), broken.sentence(true), 'Error: ')
  }

  const verdict = judgeBoot(monitor)
  return verdict.healthy && isJustCold ? WARMING_UP : verdict
}

/** Whether it is switched off in an emergency, which must not take the service down: a health
 *  route of its own asks health(). */
function isWithoutMonitor(): boolean {
  return monitor.state !== 'accepting' && isSwitchedOff('FTW_MONITOR')
}

/** A boot ends with the warm-up. */
function judgeBoot({ state, warmup }: Monitor): Verdict {
  if (state !== 'accepting') return BOOTING
  if (warmup.state === 'cold') return BOOTING
  if (warmup.state === 'running') return WARMING_UP
  if (warmup.state === 'failed') {
    return fault('warmup_failed', WARMUP_FAILED, `${WARMUP_FAILED}: ${warmup.failure}`)
  }
  return HEALTHY
}

/** A verdict that somebody has to look after. */
function fault(state: VerdictState, reason: string, cause: string, prefix = ''): Verdict {
  return {
    healthy: false,
    state,
    grade: 'fail',
    reason: toRedLine(prefix + reason),
    explanation: toRedLine(prefix + cause),
    cause: toRedLine(cause)
  }
}

/** Makes one line for a red reply, in which HAProxy's `expect string OK` finds nothing. */
function toRedLine(text: string): string {
  return clean(text).replaceAll('OK', 'O K').slice(0, REASON_MAX)
}

/** Whether something has to be asked before the verdict is told: a promise where there is nothing
 *  costs more than the rest of a check. */
function isInquiryDue(): boolean {
  if (monitor.draining || isWithoutMonitor()) return false
  if (monitor.server && monitor.isInstanceClosing) return false // it is known
  if (databases.size > 0 || registeredChecks.size > 0) return true
  const { ofInquiries } = monitor.extensions
  return attemptOwn(() => ofInquiries.some((each) => each.isInquiryDue)) === true
}

/** The verdict as a check sees it. */
function judgeAndTell(): Verdict {
  const verdict = judge()
  if (!monitor.isOff) tellExtensions(monitor, verdict)
  return verdict
}

function tellExtensions(owner: Monitor, verdict: Verdict): void {
  owner.toldVerdict = verdict
  for (const each of owner.extensions.ofVerdicts) attemptOwn(() => each.onVerdict?.(verdict))
}

/** Tells when it happens what is known without asking anybody: a boot, a warm-up, a drain, the end.
 *  Whether the instance is green is not known so: its databases may be gone meanwhile. */
function tellIfRed(owner: Monitor): void {
  if (owner !== monitor || owner.isOff) return
  const verdict = judge()
  if (!verdict.healthy) tellExtensions(owner, verdict)
}

async function inquireAndJudge(): Promise<Verdict> {
  const wasDraining = monitor.draining !== undefined
  await inquireIfDue()
  const isResumed = wasDraining && !monitor.draining
  if (isResumed) await inquireIfDue() // while it drained, nothing was asked
  return judgeAndTell()
}

async function inquireIfDue(): Promise<void> {
  if (isInquiryDue()) await inquire()
}

/** Asks even if the verdict does not depend on the answers, as during a drain. */
async function inquire(): Promise<void> {
  const inquiries = allDependencies().map((each) => each.ask())
  monitor.extensions.tell((each) => {
    if (each.isInquiryDue && each.inquire) inquiries.push(each.inquire().catch(logFault))
  })
  await Promise.all(inquiries)
  // What was registered meanwhile is asked, too; but only once, since that may go on without end.
  const added = allDependencies().filter(({ isAsked }) => !isAsked)
  await Promise.all(added.map((each) => each.ask()))
}

// --- Databases and checks ------------------------------------------------------------------------

// What the instance cannot serve without, and what the service counts that it does with a database.
// They stay registered when the monitor stops.

const databases = new Map<string, RegisteredDatabase>()
const registeredChecks = new Map<string, Dependency>()

/** Methods that a database may have besides `isConnected`. Layers add to it. */
const databaseMethods: string[] = []

/** Registers a database, or replaces it: it is connected if `isConnected` returns `true` itself.
 *  Returns the counters on which the service tells what it does with it. Throws a `TypeError` for a
 *  name with white space, and for what is no method. */
export const registerDatabase: (name: string, database: Database) => Activity = shared(
  'registerDatabase',
  (name, database) => {
    must(isWord(name), 'a database has a name without white space')
    must(hasMethods(database, 'isConnected'), 'a database has isConnected()')
    for (const method of databaseMethods) {
      must(mayHaveMethod(database, method), `${method} of a database is a function`)
    }
    must(['boolean', 'undefined'].includes(typeof database.optional), 'optional is true or false')
    const registered = new RegisteredDatabase(name, database)
    databases.set(name, registered)
    return activityOf(registered)
  }
)

/** Where the service counts what it does with a database. A layer that shows this puts counters in
 *  place of those that count nothing. */
let activityOf: (registered: RegisteredDatabase) => Activity = () => {
  return { loads: doNothing, stores: doNothing, connections: doNothing }
}

/** Registers a check of what is no database, such as free space on a disk, or replaces it. It
 *  passes unless it throws or returns `false`: `null`, `0` and `''` pass. Throws a `TypeError` for
 *  a name with white space, for what is no function, and for wrong options. */
export const registerCheck: (name: string, check: Check, options?: CheckOptions) => void = shared(
  'registerCheck',
  (name, check, options = {}) => {
    must(isWord(name), 'a check has a name without white space')
    must(typeof check === 'function', 'a check is a function')
    mustHaveOnly(options, ['optional'], 'a check takes')
    const { optional = false }: CheckOptions = options
    must(typeof optional === 'boolean', 'optional is true or false')
    const passes = async (): Promise<boolean> => (await check()) !== false
    registeredChecks.set(name, new Dependency('Check', name, optional, passes))
  }
)

/** A database or a check, and what its last answer was. */
class Dependency {
  readonly name: string
  readonly isOptional: boolean
  readonly call: SharedCall
  readonly #kind: 'Database' | 'Check'
  /** Of the last answer, undefined until there is one. */
  #outcome: 'passes' | 'disconnected' | 'timed out' | 'failed' | undefined
  /** What it threw, '' if nothing: for this machine. */
  #detail = ''

  constructor(
    kind: 'Database' | 'Check',
    name: string,
    isOptional: boolean,
    passes: () => unknown
  ) {
    this.#kind = kind
    this.name = name
    this.isOptional = isOptional
    this.call = new SharedCall(passes, ANSWER_MS)
  }

  /** Asks it, and keeps the outcome. */
  async ask(): Promise<void> {
    try {
      const answer = await this.call.ask()
      const wasBroken = this.isAsked && !this.isPassing
      const no = this.#kind === 'Database' ? 'disconnected' : 'failed'
      this.#outcome = answer === true ? 'passes' : no
      // That only `true` itself counts is easily forgotten.
      const kind = answer === null ? 'null' : typeof answer
      this.#detail =
        kind === 'boolean' ? '' : `isConnected() returned a value of type ${kind}, not true`
      // Whatever failed to warm up may have failed for want of it.
      if (wasBroken && this.isPassing) monitor.warmup.retryAtOnce()
    } catch (error) {
      const isLate = error === TIMED_OUT
      this.#outcome = isLate ? 'timed out' : 'failed'
      this.#detail = isLate ? '' : errorText(error)
    }
  }

  /** Whether it has answered, or failed to, at least once: before that, it is not judged. */
  get isAsked(): boolean {
    return this.#outcome !== undefined
  }

  get isPassing(): boolean {
    return this.#outcome === 'passes'
  }

  /** Whether it cannot be judged yet. */
  get isPremature(): boolean {
    return !this.isAsked
  }

  /** Whether it was just asked too early, before the instance was warm. */
  get isCold(): boolean {
    return false
  }

  /** What is wrong with it, '' if nothing: its category and, for this machine, what it threw. */
  trouble(isLocal: boolean): string {
    const category = this.#outcome ?? ''
    if (this.isPassing) return ''
    return isLocal && this.#detail !== '' ? `${category}: ${this.#detail}` : category
  }

  /** `Database 'main' disconnected.`, in ftw.monitor's words; for this machine, `Database 'main'
   *  failed: connect ECONNREFUSED 10.0.0.7:5432`. */
  sentence(isLocal: boolean): string {
    const end = isLocal && this.#detail !== '' ? '' : '.'
    return `${this.#kind} '${this.name}' ${this.trouble(isLocal)}${end}`
  }
}

class RegisteredDatabase extends Dependency {
  readonly database: Database

  constructor(name: string, database: Database) {
    super('Database', name, database.optional === true, () => database.isConnected())
    this.database = database
  }
}

function allDependencies(): Dependency[] {
  return [...databases.values(), ...registeredChecks.values()]
}

/** The first one that the instance needs and that does not pass. What is just cold comes last. */
function firstBroken(): Dependency | undefined {
  if (databases.size === 0 && registeredChecks.size === 0) return undefined
  const broken = allDependencies().filter((each) => {
    return !each.isPassing && !each.isOptional && !each.isPremature
  })
  return broken.find(({ isCold }) => !isCold) ?? broken[0]
}

// --- Shared calls --------------------------------------------------------------------------------

/** Calls a function of the application's. Whoever asks while a call is pending shares its answer,
 *  so that many probers cost one query. A call that hangs for 30 s is made anew, and then the first
 *  of the two that answers decides. */
class SharedCall {
  /** How long the last answer took, -1 if there was none. */
  answeredMs = -1
  /** When it was called last. */
  askedAtMs = -Infinity
  /** Since when an answer is awaited, undefined if none is. */
  pendingSinceMs: number | undefined
  readonly #call: () => unknown
  readonly #limitMs: number
  /** The answer of the pending call, undefined if there is none. */
  #answer: Promise<unknown> | undefined
  /** The same, or a rejection with TIMED_OUT when the limit is over. */
  #answerInTime: Promise<unknown> = Promise.resolve()

  constructor(call: () => unknown, limitMs: number) {
    this.#call = call
    this.#limitMs = limitMs
  }

  ask(): Promise<unknown> {
    const isPending = this.#answer !== undefined
    if (isPending && performance.now() - this.askedAtMs < QUESTION_MS) return this.#answerInTime

    this.askedAtMs = performance.now()
    this.pendingSinceMs ??= this.askedAtMs
    this.#answer = this.#callBeside(this.#answer, this.askedAtMs)
    this.#answerInTime = withinLimit(this.#answer, this.#limitMs)
    this.#answerInTime.catch(doNothing) // nobody may be waiting any more
    return this.#answerInTime
  }

  /** The earlier call may still answer, but its failure no longer tells anything. */
  async #callBeside(before: Promise<unknown> | undefined, askedAtMs: number): Promise<unknown> {
    try {
      const call = new Promise((resolve) => resolve(this.#call())) // which may throw
      const answer = await (before ? Promise.race([call, before.catch(() => call)]) : call)
      this.answeredMs = performance.now() - askedAtMs
      return answer
    } finally {
      if (this.askedAtMs === askedAtMs) {
        this.#answer = undefined
        this.pendingSinceMs = undefined
      }
    }
  }
}

// --- Warm-up -------------------------------------------------------------------------------------

// Each site has a performer, and a state. One queue warms them one after the other; whoever asks
// for some of them waits for these. The state of the whole is derived from its sites: the instance
// is green if no site's last warm-up failed, and each that was there at boot was warmed.

const performers = new Map<string, WarmupPerformer>()

/** Registers what warms a site, a path such as `/` or `/shop`: after boot, and when this machine
 *  asks for `/@@warmup` or `/shop/@@warmup`. A site registered again is replaced. Throws a
 *  `TypeError` for what is no path or no function. */
export const registerWarmup: (site: string, performer: WarmupPerformer) => void = shared(
  'registerWarmup',
  (site, performer) => {
    must(isSitePath(site), 'a site is / or /a/path')
    must(typeof performer === 'function', 'a warm-up performer is a function')
    addSite(toSiteName(site), performer)
  }
)

function addSite(name: string, performer: WarmupPerformer): void {
  const wasGreen = monitor.warmup.state === 'done'
  performers.set(name, performer)
  monitor.warmup.onRegistered(name, wasGreen)
}

/** As it stands in a URL. */
function toSiteName(page: string): string {
  const { pathname, search } = new URL(page, 'http://localhost')
  return (withoutSlashes(pathname) || '/') + search
}

/** What is warmed where nothing is registered. Layers add to it. */
const defaultPerformers = new Map<string, WarmupPerformer>()

function currentPerformers(): Map<string, WarmupPerformer> {
  return performers.size > 0 ? performers : defaultPerformers
}

function siteNames(): Iterable<string> {
  return currentPerformers().keys()
}

/** How the warm-up of a site stands. */
type SiteState = 'off' | 'waiting' | 'running' | 'warm' | 'failed'

/** A site from boot to the end of the instance. */
class Site {
  readonly name: string
  state: SiteState
  /** Whether it has to be warm before the instance is green. */
  isAwaited = true
  /** Why its last warm-up failed, '' if it did not. */
  failure = ''
  /** Of the warm-up that runs, or else of the next one. */
  #controller = new AbortController()
  #startedAtMs = 0
  #seconds = 0

  constructor(name: string, state: 'off' | 'waiting') {
    this.name = name
    this.state = state
  }

  /** How long its warm-up took, or has run so far. */
  get seconds(): number {
    return this.state === 'running' ? this.#secondsSinceStart : this.#seconds
  }

  /** Makes it wait for its warm-up, unless that runs already. */
  expect(isAwaited: boolean): void {
    if (this.state !== 'running') this.state = 'waiting'
    this.isAwaited = isAwaited
  }

  /** Never rejects, and ends when it is aborted, even if the performer ignores the signal. */
  async warmUp(url: string, clock: Clock): Promise<void> {
    const { name } = this
    const { signal } = this.#controller
    const expire = (): void => this.abort(`no end after ${WARMUP_MS / 60_000} minutes`)
    clock.schedule(WARMUP_MS, expire)
    let pauseMs = WARMUP_TOLD_MS
    const tell = (): void => {
      log('warn', `${name} still running after ${this.seconds.toFixed(0)} s`)
      clock.schedule(pauseMs, tell)
      pauseMs *= 2
    }
    clock.schedule(pauseMs, tell)
    this.state = 'running'
    this.failure = ''
    this.#startedAtMs = performance.now()

    try {
      signal.throwIfAborted()
      await untilAbort(signal, currentPerformers().get(name)?.({ site: name, url, signal }))
      signal.throwIfAborted()
      this.state = 'warm'
    } catch (error) {
      this.state = 'failed'
      this.failure = errorText(error)
    }
    this.#seconds = this.#secondsSinceStart

    clock.cancel(expire)
    clock.cancel(tell)
    this.#controller = new AbortController() // work that goes on afterwards must not be aborted
  }

  /** Ends the warm-up that runs, or else the next one. */
  abort(reason: string): void {
    this.#controller.abort(new Error(reason))
  }

  get #secondsSinceStart(): number {
    return (performance.now() - this.#startedAtMs) / 1_000
  }
}

type WarmupState = 'off' | 'cold' | 'running' | 'done' | 'failed'

/** Warms the sites of one boot, one after the other, and tries again what has failed. */
class WarmupRunner {
  readonly #monitor: Monitor
  readonly #isAutomatic = !isSwitchedOff('FTW_MONITOR_AUTOWARMUP')
  readonly #sites = new Map<string, Site>()
  #life: 'preparing' | 'begun' | 'over' = 'preparing'
  readonly #preparation = new AbortController()

  constructor(owner: Monitor) {
    this.#monitor = owner
  }

  get sites(): Site[] {
    return Array.from(siteNames(), (name) => this.#site(name))
  }

  /** It is read by every check, so it builds no list. */
  get state(): WarmupState {
    for (const { isAwaited } of this.#queue.keys()) {
      if (isAwaited) return 'running'
    }
    let whole: WarmupState = 'done'
    for (const name of siteNames()) {
      const { state, isAwaited } = this.#site(name)
      if (state === 'failed') return 'failed'
      if (state === 'waiting' && isAwaited) whole = 'cold'
      else if (state === 'off' && whole === 'done') whole = 'off'
    }
    return whole
  }

  /** Why the instance is not warm, '' if it is. */
  get failure(): string {
    return describeFailures(this.sites)
  }

  /** Warms up after boot, until all is warm: one passing error must not keep an instance out for
   *  good. */
  begin(): void {
    if (this.#isAutomatic) {
      void this.#beginWhenPrepared()
    } else {
      this.#life = 'begun'
      void inquireAndJudge() // the boot is over
    }
  }

  async #beginWhenPrepared(): Promise<void> {
    const { signal } = this.#preparation
    for (const extension of this.#monitor.extensions.all) {
      await attemptOwn(() => extension.prepareWarmup?.(signal))?.catch(logFault)
    }
    this.beginNow()
  }

  /** Warms what waits, whatever is not prepared yet. */
  beginNow(): void {
    if (this.#life !== 'preparing') return
    this.#life = 'begun'
    this.#takeNextStep()
  }

  /** A site that is registered while the instance is green only takes it out if it fails. */
  onRegistered(name: string, wasGreen: boolean): void {
    if (currentShutdown || this.#life !== 'begun' || this.#site(name).state !== 'waiting') return
    void this.warmUp([name], !wasGreen)
  }

  abort(reason: string): void {
    this.#preparation.abort(new Error(reason))
    for (const site of this.#queue.keys()) site.abort(reason)
  }

  end(): void {
    this.#life = 'over'
    this.abort('the monitor was stopped')
  }

  #site(name: string): Site {
    const known = this.#sites.get(name)
    if (known) return known
    const site = new Site(name, this.#isAutomatic ? 'waiting' : 'off')
    this.#sites.set(name, site)
    return site
  }

  // The queue

  /** The first site is running, the others wait. Each promise resolves to why that site failed, ''
   *  if it did not. */
  readonly #queue = new Map<Site, Promise<string>>()
  /** When the last one was over for which the instance was red. */
  #awaitedUntilMs = -Infinity

  /** Whether the warm-up was running, or yet to come, when something was asked. */
  wasColdAt(askedAtMs: number): boolean {
    const { state } = this
    return state === 'cold' || state === 'running' || askedAtMs < this.#awaitedUntilMs
  }

  /** Queues the sites that are not in the queue yet; unless nobody awaits them, the instance is red
   *  until all of them are done. Resolves to why they failed, '' if they did not. */
  async warmUp(names: string[], isAwaited = true): Promise<string> {
    const sites = names.map((name) => this.#site(name))
    const added = sites.filter((site) => !this.#queue.has(site))
    if (added.length > 0) log('info', `warms up ${added.map(({ name }) => name).join(', ')}`)
    for (const site of sites) site.expect(isAwaited)
    const done = Promise.all(sites.map((site) => this.#enqueue(site)))
    // A further try of what has failed is no change.
    if (this.#monitor.toldVerdict.grade !== 'fail') tellIfRed(this.#monitor)
    const failures = await done
    return failures.filter(Boolean).join('; ')
  }

  #enqueue(site: Site): Promise<string> {
    const queued = this.#queue.get(site)
    if (queued) return queued
    const done = this.#warmInTurn(site)
    this.#queue.set(site, done)
    return done
  }

  async #warmInTurn(site: Site): Promise<string> {
    await [...this.#queue.values()].at(-1)
    const { instance, clock } = this.#monitor
    await site.warmUp(withoutSlashes(`${instance?.url}${site.name}`), clock)

    const failure = describeFailures([site])
    this.#queue.delete(site)
    if (site.isAwaited) this.#awaitedUntilMs = performance.now()
    if (this.#life !== 'over') this.#logOutcome(site)
    if (this.#queue.size === 0) this.#takeNextStep()
    const isOver = this.#queue.size === 0 && this.#life !== 'over'
    if (isOver) void inquireAndJudge() // as the next prober would
    return failure
  }

  #logOutcome({ name, failure, seconds }: Site): void {
    const { sites } = this
    const warm = sites.filter(({ state }) => state === 'warm')
    const outcome = failure ? `failed (${failure})` : 'is warm'
    const text = `(${warm.length}/${sites.length}) ${name} ${outcome} after ${seconds.toFixed(1)} s`
    log(failure ? 'warn' : 'info', text)
  }

  // Further tries

  /** When what has failed is tried again. */
  retryAtTickMs: number | undefined
  #retryPauseMs = WARMUP_RETRY_MS

  /** Warms what still waits, and tries again what has failed. */
  readonly #takeNextStep = (): void => {
    const { isInstanceClosing, clock } = this.#monitor
    if (this.#life !== 'begun' || this.#queue.size > 0 || currentShutdown) return
    if (isInstanceClosing) {
      clock.schedule(TICK_MS, this.#takeNextStep) // one of another process may come back
      return
    }

    const waiting = this.sites.filter(({ state }) => state === 'waiting')
    const { failure } = this
    if (waiting.length > 0) void this.warmUp(waiting.map(({ name }) => name))
    else if (failure === '') this.#retryPauseMs = WARMUP_RETRY_MS
    else if (this.retryAtTickMs === undefined) this.#retryLater(failure)
  }

  #retryLater(failure: string): void {
    const pauseMs = this.#retryPauseMs
    log('warn', `tries again in ${pauseMs / 1_000} s: ${failure}`)
    const { clock } = this.#monitor
    this.retryAtTickMs = clock.nowTickMs + pauseMs
    this.#retryPauseMs = Math.min(pauseMs * 2, WARMUP_RETRY_MAX_MS)
    clock.schedule(pauseMs, this.#retry)
  }

  readonly #retry = (): void => {
    this.retryAtTickMs = undefined
    for (const site of this.sites) {
      if (site.state === 'failed') site.expect(true)
    }
    this.#takeNextStep()
  }

  /** Call it when something is back for want of which it may have failed. */
  retryAtOnce(): void {
    if (this.retryAtTickMs === undefined) return
    this.#monitor.clock.cancel(this.#retry)
    this.#retry()
  }
}

/** Settles with some work, or resolves when the signal aborts. */
async function untilAbort(signal: AbortSignal, work: unknown): Promise<void> {
  const { promise: aborted, resolve } = deferred<void>()
  const onAbort = (): void => resolve()
  signal.addEventListener('abort', onAbort)
  try {
    await Promise.race([work, aborted])
  } finally {
    signal.removeEventListener('abort', onAbort)
  }
}

/** Why these sites are not warm, '' if they are. */
function describeFailures(sites: Site[]): string {
  const failures: string[] = []
  for (const { name, failure } of sites) {
    if (failure) failures.push(name === '/' ? failure : `${name}: ${failure}`)
  }
  return failures.join('; ')
}

// --- Who asks ------------------------------------------------------------------------------------

// Whether somebody on this machine asks, and whether that is a person. Behind a proxy on it all
// visitors look local, and any web page can make a browser on it send a request. But nobody
// forwards visitors to the monitor's port, so its rule is kinder than one for the service's own.

/** At the monitor's port a person may use a browser. */
function isLocalOperator({ headers }: http.IncomingMessage, session: Session): boolean {
  const isOnUnixSocket = session.listener.unixSocket !== undefined // no page reaches that
  if (!session.local || (!isOnUnixSocket && !isForOwnName(headers))) return false
  return !isForwarded(headers) && LOCAL_SITES.includes(fetchSiteOf(headers))
}

/** No browser, one in which a person typed our address, or our own page, which refreshes itself. */
const LOCAL_SITES = [undefined, 'none', 'same-origin']

function isLocalSocket({ remoteAddress, localAddress }: net.Socket): boolean {
  if (remoteAddress === undefined || monitor.isOnlySocketLocal) return false
  return remoteAddress === localAddress || LOCAL_ADDRESS.test(remoteAddress)
}

/** Where something on this machine forwards strangers to our ports, addresses tell nothing. */
function isOnlySocketLocal({ local }: CheckedStartOptions): boolean {
  const read = (text: string): boolean | undefined => text === 'socket' || undefined
  return local === 'socket' || readEnvAs('FTW_MONITOR_LOCAL', read, 'must be socket') === true
}

const LOCAL_ADDRESS = /^((::ffff:)?127\.|::1$)/ // 127.0.0.1, ::ffff:127.0.0.1, ::1

function isForwarded(headers: http.IncomingHttpHeaders): boolean {
  return Object.keys(headers).some((name) => FORWARDING_HEADER.test(name))
}

const FORWARDING_HEADER = /^(forwarded|x-forwarded-.*|x-real-ip|via|origin)$/ // origin: of a page

/** Which site made a browser send this, in the words of `Sec-Fetch-Site`; undefined if it is no
 *  browser. Old browsers never send that header, and others only over TLS, but all of them claim to
 *  be Mozilla. */
function fetchSiteOf(headers: http.IncomingHttpHeaders): string | undefined {
  const site = headers['sec-fetch-site']?.toString()
  if (site !== undefined) return site
  return headers['user-agent']?.startsWith('Mozilla/') ? 'unknown' : undefined
}

/** Whether a person looks at the answer. Some balancers call themselves Mozilla, too, but say that
 *  they are only compatible: `Mozilla/5.0 (compatible; Cloudflare-Traffic-Manager/1.0; …)`. */
function isForPerson(headers: http.IncomingHttpHeaders): boolean {
  if ('sec-fetch-site' in headers) return true
  const { 'user-agent': agent = '' } = headers
  return agent.startsWith('Mozilla/') && !agent.includes('(compatible;')
}

/** A request from a web page whose name was rebound to 127.0.0.1 comes from this machine, but bears
 *  that name. */
function isForOwnName(headers: http.IncomingHttpHeaders): boolean {
  const host = headers.host ?? headers[':authority']?.toString()
  if (!host) return true // HTTP/1.0
  const name = nameInHost(host)
  if (name === 'localhost' || net.isIP(name) !== 0) return true
  return monitor.instance !== undefined && name === nameInHost(new URL(monitor.instance.url).host)
}

function nameInHost(host: string): string {
  const [, ipv6, name = ''] = HOST_HEADER.exec(host.toLowerCase()) ?? []
  return ipv6 ?? name
}

const HOST_HEADER = /^(?:\[(.+)\]|([^:]+))(?::\d+)?$/ // [::1]:8080, localhost:8080, localhost

// --- Probers -------------------------------------------------------------------------------------

// Who asks for the verdict, and at which pace: a drain waits until each of them knows. All times
// are by the monitor's clock.

/** What we look at to know whether somebody may be a prober, and which one. */
type ProberAsker = Pick<Asker, 'isPerson' | 'remoteAddress'>

/** An address that asks for the verdict. */
class Prober {
  /** How many drained answers it had. */
  drainedAnswers = 0
  /** As how many answers each of its own counts. */
  answersPerAsk = 1
  readonly address: string
  asks = 0
  /** When it asked the last few times, the oldest first. */
  readonly #askedAtTickMs: number[] = []

  constructor(address: string) {
    this.address = address
  }

  /** A server at `::` sees IPv4 clients as `::ffff:10.0.0.5`. */
  get shownAddress(): string {
    return this.address.replace(MAPPED_ADDRESS, '')
  }

  /** Its address without the name that it has at the health path. */
  get source(): string {
    return this.address.replace(/ .*/, '')
  }

  noteAsk(nowTickMs: number, answersPerAsk: number): void {
    this.asks++
    this.answersPerAsk = answersPerAsk
    this.drainedAnswers += answersPerAsk
    this.#askedAtTickMs.push(nowTickMs)
    if (this.#askedAtTickMs.length > PROBER_MEMORY) this.#askedAtTickMs.shift()
  }

  get lastAskedAtTickMs(): number {
    return this.#askedAtTickMs.at(-1) ?? -Infinity
  }

  /** The mean of the pauses that are known, -1 if there is none. */
  get intervalMs(): number {
    const pauses = this.#pauses
    if (pauses.length === 0) return -1
    let sumMs = 0
    for (const pauseMs of pauses) sumMs += pauseMs
    return sumMs / pauses.length
  }

  /** `asks every 2.0 s` */
  get pace(): string {
    return `asks every ${(this.intervalMs / 1_000).toFixed(1)} s`
  }

  /** Whether it asks often enough to be a balancer, and not a person. */
  get isFrequent(): boolean {
    const earlierMs = this.#askedAtTickMs.at(-PROBER_ASKS) ?? -Infinity
    return this.lastAskedAtTickMs - earlierMs <= PROBER_MS
  }

  /** A balancer whose server is in maintenance asks no more, nor does a person with curl. */
  stillAsks(nowTickMs: number): boolean {
    const silenceMs = nowTickMs - this.lastAskedAtTickMs
    return silenceMs <= PAUSES_MISSED * this.#longestPauseMs + PAUSE_MARGIN_MS
  }

  get #longestPauseMs(): number {
    return Math.max(...this.#pauses, 0)
  }

  /** Whether it can have so many drained answers in time. With the first one it may begin to ask
   *  faster, as HAProxy does (`fastinter`): so that one is waited for at its usual pace, and the
   *  others for as long as they would take if they came evenly. */
  canHave(answers: number, nowTickMs: number, latestTickMs: number): boolean {
    const asksLeft = Math.ceil((answers - this.drainedAnswers) / this.answersPerAsk)
    const leftMs = latestTickMs - this.lastAskedAtTickMs
    if (this.drainedAnswers === 0) return this.#longestPauseMs < leftMs
    return nowTickMs - this.lastAskedAtTickMs <= leftMs / asksLeft
  }

  /** How often it asks; less and less while it is silent, and 0 if it asked only once. */
  rate(nowTickMs: number): number {
    const [oldestAskMs = nowTickMs, ...others] = this.#askedAtTickMs
    if (others.length === 0) return 0
    return others.length / (nowTickMs - oldestAskMs)
  }

  /** From ask to ask. A pause of more than PROBER_MS was an absence, as in maintenance, and does
   *  not count, unless there are no others. */
  get #pauses(): number[] {
    const known = this.#askedAtTickMs
    const all = known.slice(1).map((atMs, index) => atMs - (known[index] ?? atMs))
    const regular = all.filter((pauseMs) => pauseMs <= PROBER_MS)
    return regular.length > 0 ? regular : all
  }
}

class Probers {
  readonly #monitor: Monitor
  readonly #byAddress = new Map<string, Prober>()
  #lookupsInTick = 0

  constructor(owner: Monitor) {
    this.#monitor = owner
  }

  onTick(): void {
    this.#lookupsInTick = 0
  }

  /** Remembers who asks, and as how many answers the reply counts. */
  note(asker: ProberAsker, answersPerAsk: number): void {
    if (asker.isPerson) return
    const address = this.#addressOf(asker)
    if (address === undefined) return

    const prober = this.#byAddress.get(address) ?? this.#newProber(address)
    prober.noteAsk(this.#monitor.clock.nowTickMs, answersPerAsk)
    if (prober.asks !== PROBER_ASKS) return
    this.#monitor.extensions.tell((each) => each.onProber?.(prober))
  }

  /** Returns whoever asks often enough to be a balancer, and has not stopped; from now on their
   *  drained answers count. */
  chooseFrequent(): Prober[] {
    const { nowTickMs } = this.#monitor.clock
    const frequent = [...this.#byAddress.values()].filter(
      (prober) => prober.isFrequent && prober.stillAsks(nowTickMs)
    )
    for (const prober of frequent) prober.drainedAnswers = 0
    return frequent
  }

  get known(): Iterable<Prober> {
    return this.#byAddress.values()
  }

  #newProber(address: string): Prober {
    const prober = new Prober(address)
    if (this.#monitor.draining) return prober // else one that we wait for might have to make room
    if (this.#byAddress.size >= PROBERS_MAX) this.#forgetRarest()
    this.#byAddress.set(address, prober)
    return prober
  }

  /** At the health path whoever calls itself by many names pushes out names of its own alone. */
  #forgetRarest(): void {
    const { nowTickMs } = this.#monitor.clock
    const countBySource = new Map<string, number>()
    for (const { source } of this.#byAddress.values()) {
      countBySource.set(source, (countBySource.get(source) ?? 0) + 1)
    }
    const most = Math.max(...countBySource.values())
    let rarest: Prober | undefined
    for (const prober of this.#byAddress.values()) {
      if (countBySource.get(prober.source) !== most) continue
      if (!rarest || prober.rate(nowTickMs) < rarest.rate(nowTickMs)) rarest = prober
    }
    if (rarest) this.#byAddress.delete(rarest.address)
  }

  /** Reading an address takes a system call. In a flood we do not read it, and count all as one. */
  #addressOf(asker: ProberAsker): string | undefined {
    this.#lookupsInTick++
    if (!this.#monitor.draining && this.#lookupsInTick > LOOKUPS_PER_TICK) return 'whoever'
    return asker.remoteAddress ?? this.#monitor.listener?.unixSocket
  }
}

const MAPPED_ADDRESS = /^::ffff:(?=[\d.]+$)/ // ::ffff:127.0.0.1

// --- Draining ------------------------------------------------------------------------------------

// A drained instance tells every prober its reason, and sends its clients elsewhere. By hand that
// goes on until `resume`; a shutdown begins with it.

/** Takes the instance out: every verdict is the reason, and requests are served with `Connection:
 *  close`. Resolves when each prober was told `fall` times and no request is in flight; without
 *  that at `timeoutMs`, at `resume()` and `stop()`, and at once where there is no monitor. Changes
 *  nothing about a shutdown. Rejects with a `TypeError` or `RangeError` for wrong options. */
export const drain: (options?: DrainOptions) => Promise<void> = shared(
  'drain',
  async (options = {}) => {
    mustHaveOnly(options, DRAIN_OPTIONS, 'drain takes')
    await untilDrained(toDrainOptions(options))
  }
)

/** Takes the instance in again; not while it shuts down. */
export const resume: () => void = shared('resume', () => {
  if (currentShutdown) {
    log('warn', 'does not resume: the instance is shutting down')
    return
  }
  monitor.endDraining()
})

const DRAIN_OPTIONS = ['reason', 'fall', 'timeoutMs', 'minimumMs']

function toDrainOptions({
  reason = 'Draining',
  fall = 3,
  timeoutMs = readMilliseconds('FTW_MONITOR_TIMEOUT_MS', 25_000),
  minimumMs = readMilliseconds('FTW_MONITOR_MINIMUM_MS', 0)
}: DrainOptions): Required<DrainOptions> {
  must(typeof reason === 'string' && clean(reason).trim(), 'reason must be text')
  must(Number.isInteger(fall) && fall > 0, 'fall must be a whole number from 1', RangeError)
  for (const [name, value] of Object.entries({ timeoutMs, minimumMs })) {
    must(typeof value === 'number', `${name} must be a number`)
    must(value >= 0, `${name} must be a number from 0`, RangeError)
  }
  return { reason, fall, timeoutMs, minimumMs }
}

/** The drain that goes on: what probers are told, and which of them must be. */
class Draining {
  reason: string
  readonly awaitedProbers: Prober[]
  readonly #monitor: Monitor
  readonly sinceMs = performance.now()
  /** How many drained answers a prober needs. */
  #fall: number
  /** It is not finished before that. */
  #earliestMs: number
  /** Whoever cannot be told by then is not waited for. */
  #latestTickMs: number

  constructor(
    owner: Monitor,
    { reason, fall, minimumMs }: Required<DrainOptions>,
    limitMs: number
  ) {
    this.#monitor = owner
    this.awaitedProbers = owner.probers.chooseFrequent()
    this.reason = reason
    this.#fall = fall
    this.#earliestMs = this.sinceMs + minimumMs
    this.#latestTickMs = owner.clock.nowTickMs + limitMs
  }

  /** A second drain waits for the same probers as the first. */
  change({ reason, fall, minimumMs }: Required<DrainOptions>, limitMs: number): void {
    this.reason = reason
    this.#fall = fall
    this.#earliestMs = Math.max(this.#earliestMs, performance.now() + minimumMs)
    this.#latestTickMs = this.#monitor.clock.nowTickMs + limitMs
  }

  /** Whether everyone knows who can be told in time, and `minimumMs` is over. */
  get isTold(): boolean {
    if (performance.now() < this.#earliestMs) return false
    return !this.awaitedProbers.some((prober) => this.#isMissing(prober))
  }

  /** While the monitor is closed nobody can be told. */
  get hasSomebodyToTell(): boolean {
    return this.#monitor.isRunning && this.awaitedProbers.length > 0
  }

  /** How many probers know. */
  get informedCount(): number {
    return this.awaitedProbers.filter((prober) => this.#isInformed(prober)).length
  }

  /** How many are still to be told. */
  get missingCount(): number {
    return this.awaitedProbers.filter((prober) => this.#isMissing(prober)).length
  }

  /** Who still asks, but too rarely to be told in time. */
  get tooSlowProbers(): Prober[] {
    const { nowTickMs } = this.#monitor.clock
    return this.awaitedProbers.filter((prober) => {
      const isOver = this.#isInformed(prober) || this.#isMissing(prober)
      return !isOver && prober.stillAsks(nowTickMs)
    })
  }

  #isInformed({ drainedAnswers }: Prober): boolean {
    return drainedAnswers >= this.#fall
  }

  /** Whether it has to be waited for. */
  #isMissing(prober: Prober): boolean {
    if (!this.hasSomebodyToTell || this.#isInformed(prober)) return false
    const { nowTickMs } = this.#monitor.clock
    const canHave = prober.canHave(this.#fall, nowTickMs, this.#latestTickMs)
    return canHave && prober.stillAsks(nowTickMs)
  }
}

/** Drains, and waits until each prober was told and no request is in flight. Reports what it waits
 *  for. Resolves to why it ended early, '' if it did not. */
async function untilDrained(
  options: Required<DrainOptions>,
  report: (progress: string) => void = doNothing
): Promise<string> {
  if (monitor.isOff) return ''
  const ofShutdown = currentShutdown && monitor.draining // which takes its own course
  const draining = ofShutdown ?? monitor.beginDraining(options, options.timeoutMs)
  const { traffic } = monitor
  const quiet = new QuietPeriod()
  let requestsBefore = traffic.requests
  let requestAtMs = -Infinity
  let progress = ''
  const isOver = (): boolean => {
    if (monitor.draining !== draining) return true
    const { isTold } = draining
    if (isTold) traffic.sendSessionsElsewhere()
    const { requests, requestsInFlight } = traffic
    const haveRequestsCome = requests !== requestsBefore
    requestsBefore = requests
    if (haveRequestsCome) requestAtMs = performance.now()
    quiet.sample(haveRequestsCome || requestsInFlight > 0 || !isTold)
    progress = describeProgress(draining, performance.now() - requestAtMs < QUIET_MS)
    report(`Draining: ${progress}`)
    return quiet.hasLasted(QUIET_MS)
  }
  const isInTime = await pollUntil(isOver, options.timeoutMs)
  if (monitor.draining !== draining) return 'Not drained: resumed meanwhile'
  return isInTime ? '' : describeLate(options.timeoutMs, progress)
}

function describeLate(afterMs: number, progress: string): string {
  return `Not drained after ${afterMs / 1_000} s: ${progress}`
}

function describeProgress(draining: Draining, doRequestsCome = false): string {
  const { informedCount, missingCount } = draining
  const known = `${informedCount} of ${informedCount + missingCount} probers know`
  const { server, requestsInFlight, upgradedConnections } = monitor.traffic
  if (!server) return known
  const requests = doRequestsCome
    ? 'requests keep coming'
    : plural(requestsInFlight, 'request in flight', 'requests in flight')
  const progress = `${known}, ${requests}`
  return upgradedConnections > 0
    ? `${progress}, ${plural(upgradedConnections, 'upgraded connection', 'upgraded connections')}`
    : progress
}

// --- Shutdown ------------------------------------------------------------------------------------

// The end of an instance, in an order in which no request is refused that might still come, and
// none meets a closed database.

/** Ends what the instance does: tells `onSignal`, drains, stops listening, waits for the requests,
 *  calls `cleanUp`, ends upgraded connections, stops the monitor, and closes the servers that the
 *  application has not closed. Resolves when all that is done; what takes longer than `exitAfterMs`
 *  is logged, and ends the process with 1. Options that are left out are those of
 *  `shutdownOnSignal`. Calling it twice makes one shutdown. Do not await it before you answer a
 *  request, since it waits for that request. A second call waits at most 5 s for `onSignal` and
 *  `cleanUp`: one of them may have made the call, and would wait for itself. Rejects with a
 *  `TypeError` or `RangeError` for wrong options. */
export const shutdown: (options?: ShutdownOptions) => Promise<void> = shared(
  'shutdown',
  async (options = {}) => {
    const ofSignals = signals.options
    const checked = ofSignals ? overridden(ofSignals, options) : toShutdownOptions(options)
    // One that cleans nothing up is followed by this one, when others have heard of the signal.
    if (currentShutdown?.ending.isFinal === false) {
      await currentShutdown.done.promise
      await new Promise((resolve) => setImmediate(resolve))
    }
    const earlier = currentShutdown
    const current = beginShutdown(checked)
    if (current === earlier) await current.join()
    else await current.done.promise
  }
)

/** The options of shutdownOnSignal(), overridden by these; where the two times do not fit, the one
 *  that was given here counts. Methods may use `this`. */
function overridden(
  { given }: CheckedShutdownOptions,
  options: ShutdownOptions
): CheckedShutdownOptions {
  mustHaveOnly(options, SHUTDOWN_OPTIONS, 'a shutdown takes')
  const merged: ShutdownOptions = {}
  for (const name of SHUTDOWN_OPTIONS) {
    const owner = Reflect.get(options, name) === undefined ? given : options
    const value: unknown = Reflect.get(owner, name)
    Reflect.set(merged, name, typeof value === 'function' ? value.bind(owner) : value)
  }
  const { timeoutMs = 0, exitAfterMs = Infinity } = merged
  const other = options.timeoutMs === undefined ? 'timeoutMs' : 'exitAfterMs'
  if (exitAfterMs <= timeoutMs && options[other] === undefined) delete merged[other]
  return toShutdownOptions(merged)
}

interface CheckedShutdownOptions extends Required<DrainOptions> {
  /** As they were given, since `onSignal` and `cleanUp` may use `this`. */
  given: ShutdownOptions
  exitAfterMs: number
  /** What becomes of the process, where a signal began it. */
  ending: Ending
}

const SHUTDOWN_OPTIONS = [...DRAIN_OPTIONS, 'onSignal', 'cleanUp', 'exitAfterMs', 'signals']

function toShutdownOptions(options: ShutdownOptions): CheckedShutdownOptions {
  mustHaveOnly(options, SHUTDOWN_OPTIONS, 'a shutdown takes')
  const drainOptions = toDrainOptions(options)
  const timeoutMs = fittingTimeoutMs(options, drainOptions.timeoutMs)
  const minimumMs = fittingMinimumMs(drainOptions.minimumMs, timeoutMs)
  const { exitAfterMs = timeoutMs + EXIT_MARGIN_MS } = options
  must(mayHaveMethod(options, 'onSignal'), 'onSignal must be a function')
  must(mayHaveMethod(options, 'cleanUp'), 'cleanUp must be a function')
  must(typeof exitAfterMs === 'number', 'exitAfterMs must be a number')
  must(
    exitAfterMs > timeoutMs && exitAfterMs <= TIMER_MAX_MS,
    `exitAfterMs must be greater than timeoutMs, and at most ${TIMER_MAX_MS}`,
    RangeError
  )
  return { given: options, ...drainOptions, timeoutMs, minimumMs, exitAfterMs, ending: EXIT }
}

/** A `timeoutMs` in the environment must not make an `exitAfterMs` in code invalid. */
function fittingTimeoutMs({ timeoutMs, exitAfterMs }: ShutdownOptions, checkedMs: number): number {
  const text = readEnv('FTW_MONITOR_TIMEOUT_MS')
  if (text === undefined || timeoutMs !== undefined || exitAfterMs === undefined) return checkedMs
  if (checkedMs < exitAfterMs) return checkedMs
  const fittingMs = Math.max(0, exitAfterMs - EXIT_MARGIN_MS)
  const used = `uses ${fittingMs} ms, since exitAfterMs is ${exitAfterMs}`
  log('warn', `cannot use FTW_MONITOR_TIMEOUT_MS=${text}: ${used}`)
  return fittingMs
}

/** Cuts a `minimumMs` that is too long, with a warning. */
function fittingMinimumMs(minimumMs: number, timeoutMs: number): number {
  const tellingMs = tellingLimitMs(timeoutMs)
  if (minimumMs <= tellingMs) return minimumMs
  const limit = `timeoutMs of ${timeoutMs} leaves ${tellingMs} ms for that`
  log('warn', `cannot serve for minimumMs of ${minimumMs}: ${limit}; raise timeoutMs`)
  return tellingMs
}

/** One that cleans nothing up may be followed by another one. */
function beginShutdown(options: CheckedShutdownOptions, signal?: NodeJS.Signals): Shutdown {
  const mayFollow = currentShutdown?.isRunning === false && !currentShutdown.ending.isFinal
  if (currentShutdown && !mayFollow) return currentShutdown
  currentShutdown = new Shutdown(options, signal)
  void currentShutdown.perform()
  return currentShutdown
}

/** `telling`: the verdict is red, and each prober is told. `settling`: until no request comes.
 *  `closing`: no connection is accepted, and every request finishes. `cleaning`: `cleanUp`, and the
 *  goodbye of upgraded connections. */
type ShutdownState = 'telling' | 'settling' | 'closing' | 'cleaning' | 'done'

/** How long probers may take to be told: all of the time but what requests have in any case. */
function tellingLimitMs(timeoutMs: number): number {
  return Math.max(timeoutMs - REQUESTS_MS, timeoutMs * TELLING_SHARE)
}

/** Tells which requests these are: `: GET /forever`. A layer may name them. */
let describeRequests: (requests: RequestInFlight[]) => string = () => ''

class Shutdown {
  state: ShutdownState = 'telling'
  /** Resolves when it is over. */
  readonly done = deferred<void>()
  readonly #options: CheckedShutdownOptions
  readonly #signal: NodeJS.Signals | undefined
  /** Nobody who presses Ctrl-C at a terminal wants to wait for a balancer. */
  readonly #isAtTerminal: boolean
  readonly #monitor = monitor
  readonly #traffic = monitor.traffic
  /** All that is closed, including what is not judged. */
  readonly #allTraffic = monitor.allTraffic
  readonly #startedAtMs = performance.now()
  /** What is still to be done, in words. */
  readonly #undone = new Set<string>()
  /** Whether somebody else than who began it waits for it. */
  #isJoined = false
  /** Resolves when `cleanUp` has had CALLBACKS_MS: it may wait for this very shutdown. */
  readonly #released = deferred<void>()

  constructor(options: CheckedShutdownOptions, signal: NodeJS.Signals | undefined) {
    this.#options = options
    this.#signal = signal
    this.#isAtTerminal = signal === 'SIGINT' && process.stdin.isTTY
  }

  get isRunning(): boolean {
    return this.state !== 'done'
  }

  get ending(): Ending {
    return this.#options.ending
  }

  async perform(): Promise<void> {
    const { given, exitAfterMs } = this.#options
    // It keeps the process alive: else that might end before cleanUp was called.
    const deadline = setTimeout(() => this.#onDeadline(), exitAfterMs)

    log('info', `shuts down${this.#signal ? ` after ${this.#signal}` : ''}`)
    const event = { signal: this.#signal }
    const signalHandled = this.#do('onSignal', () => given.onSignal?.(event))
    this.#monitor.warmup.abort('the instance is shutting down') // one may ask this very instance
    await this.#do('draining', () => this.#drain())
    this.#enter('closing')
    await this.#do('the requests in flight', () => this.#close())
    if (this.ending.isFinal) await this.#cleanUp(event, signalHandled)

    const keepAlive = setTimeout(doNothing, GOODBYE_MS) // for whoever awaits the shutdown
    await this.#do('the monitor', () => this.#endMonitor())
    clearTimeout(keepAlive)
    clearTimeout(deadline)
    this.#enter('done')
    this.done.resolve()
  }

  async #endMonitor(): Promise<void> {
    await this.#monitor.end()
    if (!this.#signal) this.closeServers() // else whoever listens for it may want to
    const isProcessEnding = this.#signal !== undefined && this.ending.isFinal
    if (!isProcessEnding) this.#monitor.unhookServers() // else nothing is to be served any more
  }

  /** For a call of shutdown() that did not begin it. */
  async join(): Promise<void> {
    this.#isJoined = true
    await Promise.race([this.done.promise, this.#released.promise])
  }

  #releaseJoined(): void {
    this.#released.resolve()
    if (!this.#isJoined) return
    log('warn', 'resolves shutdown() before it is over: onSignal or cleanUp may be waiting for it')
  }

  unrefServers(): void {
    for (const traffic of this.#allTraffic) traffic.unrefServers()
  }

  /** Closes what the application has not closed itself. */
  closeServers(): void {
    for (const traffic of this.#allTraffic) traffic.closeServers()
  }

  /** If the process is killed in the middle, the log shows how far it got. */
  #enter(state: ShutdownState): void {
    this.state = state
    log('info', `shutdown: ${state} after ${(this.#elapsedMs() / 1_000).toFixed(1)} s`)
  }

  /** Tells whoever probes, and waits for a quiet moment. */
  async #drain(): Promise<void> {
    const { minimumMs, timeoutMs } = this.#options
    const tellingMs = this.#isAtTerminal ? 0 : tellingLimitMs(timeoutMs)
    if (this.#isAtTerminal) log('info', 'finishes its requests; Ctrl-C again ends it at once')
    const options = { ...this.#options, minimumMs: Math.min(minimumMs, tellingMs) }
    const draining = this.#monitor.beginDraining(options, tellingMs)
    const isInTime = await pollUntil(() => draining.isTold, tellingMs)
    if (!isInTime) log('warn', describeLate(tellingMs, describeProgress(draining)))
    const tooSlow = this.#isAtTerminal ? [] : draining.tooSlowProbers
    for (const { shownAddress, pace } of tooSlow) {
      log('info', `${shownAddress} ${pace}: too rarely to be told in time`)
    }

    this.#enter('settling')
    this.#traffic.sendSessionsElsewhere()
    if (!this.#traffic.server) return
    const quiet = new QuietPeriod()
    let requestsBefore = this.#traffic.requests
    const isQuiet = (): boolean => {
      const { requests } = this.#traffic
      quiet.sample(requests !== requestsBefore)
      requestsBefore = requests
      return quiet.hasLasted(QUIET_MS)
    }
    const limitMs = tellingLimitMs(timeoutMs) - this.#elapsedMs()
    const isSomebodyTold = draining.hasSomebodyToTell && !this.#isAtTerminal
    await pollUntil(isQuiet, isSomebodyTold ? limitMs : Math.min(limitMs, SETTLE_MS))
  }

  /** Stops listening, and closes each connection when no request is in flight on it. */
  async #close(): Promise<void> {
    const { timeoutMs } = this.#options
    // One after the other: what the instance serves may still ask a server beside it. Some time is
    // kept for the requests of that one, since an answer of the instance may never end.
    const closings: Promise<boolean>[] = []
    for (const traffic of this.#allTraffic) {
      const closing = this.#closeTraffic(traffic)
      closings.push(closing)
      const leftMs = timeoutMs - this.#elapsedMs()
      const besideMs = Math.min(REQUESTS_MS, leftMs / 2)
      await withinLimit(closing, leftMs - besideMs).catch(doNothing)
    }
    const isInTime = (await Promise.all(closings)).every(Boolean)
    // The last bytes of ended connections are still to be sent.
    const isGone = (): boolean => this.#allTraffic.every(({ isDisconnected }) => isDisconnected)
    if (isInTime) await pollUntil(isGone, GOODBYE_MS)
    else if (this.ending.isFinal) await this.#cutRequests()
    else return // whoever hears of the signal may finish them, or cut them
    for (const traffic of this.#allTraffic) traffic.endConnections()
  }

  /** Resolves to whether all of its requests were over in time. */
  async #closeTraffic(traffic: Traffic): Promise<boolean> {
    const { timeoutMs } = this.#options
    traffic.sendClientsElsewhere()
    await traffic.beginClosing(timeoutMs - this.#elapsedMs())
    const areClosed = (): boolean => traffic.closeQuietConnections()
    return pollUntil(areClosed, timeoutMs - this.#elapsedMs())
  }

  async #cutRequests(): Promise<void> {
    const names = describeRequests(this.#allTraffic.flatMap((each) => [...each.openRequests]))
    let count = 0
    for (const traffic of this.#allTraffic) count += traffic.cutRequests()
    if (count === 0) return // a connection that had just come
    const seconds = this.#options.timeoutMs / 1_000
    const requests = plural(count, 'request that is', 'requests that are')
    log('warn', `cuts ${requests} still in flight after ${seconds} s${names}`)
    // Before cleanUp, since the application may then give back what it took of a pool.
    const isHeardOf = (): boolean => this.#allTraffic.every(({ isCutting }) => !isCutting)
    await pollUntil(isHeardOf, GOODBYE_MS)
  }

  async #cleanUp(
    event: { signal: NodeJS.Signals | undefined },
    signalHandled: Promise<void>
  ): Promise<void> {
    const { given, exitAfterMs } = this.#options
    this.#enter('cleaning')
    const cleaned = this.#do('cleanUp', () => given.cleanUp?.(event))
    await this.#do('upgraded connections', () => {
      return Promise.all(this.#allTraffic.map((traffic) => traffic.endUpgraded()))
    })
    const callbacksMs = Math.min(CALLBACKS_MS, (exitAfterMs - this.#elapsedMs()) / 2)
    const releaseTimer = setTimeout(() => this.#releaseJoined(), callbacksMs).unref()
    await Promise.all([signalHandled, cleaned])
    clearTimeout(releaseTimer)
  }

  /** A part that fails is logged, and makes the exit status 1; the other parts are done anyway. */
  async #do(name: string, part: () => unknown): Promise<void> {
    this.#undone.add(name)
    try {
      await part()
    } catch (error) {
      log('error', `failed to shut down: ${name}: ${errorText(error)}`, ...framesOf(error))
      process.exitCode ||= 1
    }
    this.#undone.delete(name)
  }

  #elapsedMs(): number {
    return performance.now() - this.#startedAtMs
  }

  #onDeadline(): void {
    if (!this.ending.isFinal) return
    const seconds = this.#options.exitAfterMs / 1_000
    log('error', `exits after ${seconds} s; ${[...this.#undone].join(', ')} did not finish`)
    this.closeServers() // with them goes the file of a Unix socket
    process.exit(1)
  }
}

// --- Signals -------------------------------------------------------------------------------------

// What `shutdownOnSignal` listens for, and what becomes of it. A signal is delayed: nobody else
// hears of it until the instance has shut down. Then our listeners and hooks come off, and it is
// let through, as if it came now.

/** Listens for `SIGTERM` and `SIGINT`; at the first one calls `shutdown(options)`. Then other
 *  listeners get the signal, and have until `exitAfterMs`, but at least 5 s; after that the process
 *  ends, even if something still keeps it alive (which is logged). If the signal comes again
 *  meanwhile, that changes nothing; only a `SIGINT` a second or more after the first signal ends
 *  the process at once, with 130. Another call replaces the options. May come before or after
 *  `start`; where that was never called, servers that listen are looked for at the signal. `stop()`
 *  takes the listeners off. Throws a `TypeError` or `RangeError` for wrong options. */
export const shutdownOnSignal: (options?: ShutdownOptions) => void = shared(
  'shutdownOnSignal',
  (options = {}) => {
    const checked = toShutdownOptions(options)
    const { signals: names = ENDING_SIGNALS } = options
    must(
      Array.isArray(names) && names.length > 0 && names.every((it) => SIGNALS.includes(it)),
      `signals must be some of ${SIGNALS.join(', ')}`
    )
    signals.listen(names, checked)
    monitor.findServers()
  }
)

/** How a shutdown ends that a signal began. */
interface Ending {
  /** Whether it cuts what is late, and cleans up; else whoever hears of the signal does that. */
  readonly isFinal: boolean
  /** Ctrl-C was pressed again while it lasts. */
  insist(first: Signal): void
  /** The instance has shut down; the time until `exitAfterMs` is left. */
  finish(first: Signal, ended: Shutdown, leftMs: number): void
}

/** A signal that came, with its number where the runtime knows it. */
interface Signal {
  name: NodeJS.Signals
  number: number | undefined
}

/** Others hear of the signal, and have some time; then the process ends in any case. */
const EXIT: Ending = {
  isFinal: true,
  insist() {
    log('warn', 'got SIGINT again; ends at once')
    currentShutdown?.closeServers() // with them goes the file of a Unix socket
    process.exit(130)
  },
  finish(first, ended, leftMs) {
    const hasOthers = signals.tellOthers(first)
    endProcess(ended, hasOthers ? Math.max(leftMs, OTHERS_MS) : 0)
  }
}

const ENDING_SIGNALS: NodeJS.Signals[] = ['SIGTERM', 'SIGINT']

/** By which somebody may ask a process to end. */
const SIGNALS = 'SIGHUP SIGINT SIGQUIT SIGUSR1 SIGUSR2 SIGTERM SIGBREAK'.split(' ')

type SignalListener = (signal: NodeJS.Signals, number?: number) => void

class Signals {
  /** The latest options, while signals are heard. */
  options: CheckedShutdownOptions | undefined
  readonly #listeners = new Map<NodeJS.Signals, SignalListener>()
  /** The listeners of others, each by the placeholder that the process has in its place. */
  readonly #heldBack = new WeakMap<SignalListener, SignalListener>()
  /** The signal that began the shutdown. */
  #first: (Signal & { atMs: number }) | undefined
  #isRepeatLogged = false
  /** `newListener` comes just before the listener is added, so we look when it has been. */
  readonly #onNewListener = (name: string | symbol, listener: unknown): void => {
    const own = this.#listeners.get(name as NodeJS.Signals)
    const isOurs = listener === own || this.#heldBack.has(listener as SignalListener)
    if (own && !isOurs) process.nextTick(() => this.#holdBack(name as NodeJS.Signals))
  }
  /** `process.removeAllListeners('SIGTERM')` must not take ours, too: without any listener the next
   *  signal would kill the process, in the middle of its shutdown perhaps. (Without a name it takes
   *  Node.js's own, too, and no signal is heard any more.) */
  readonly #onListenerRemoved = (name: string | symbol, removed: unknown): void => {
    const own = this.#listeners.get(name as NodeJS.Signals)
    if (own && removed === own) process.on(name as NodeJS.Signals, own)
  }

  get areHeard(): boolean {
    return this.options !== undefined
  }

  /** Once a signal has come, nothing new may begin. */
  get hasCome(): boolean {
    return this.#first !== undefined
  }

  listen(names: NodeJS.Signals[], options: CheckedShutdownOptions): void {
    this.release()
    this.options = options
    for (const name of new Set(names)) {
      const listener: SignalListener = (_, number) => this.#onSignal({ name, number }, options)
      this.#listeners.set(name, listener)
      process.on(name, listener)
      this.#holdBack(name)
    }
    process.on('newListener', this.#onNewListener)
    process.on('removeListener', this.#onListenerRemoved)
  }

  /** Takes our listeners off, and puts those of others back into their places. */
  release(): void {
    process.off('newListener', this.#onNewListener)
    process.off('removeListener', this.#onListenerRemoved)
    for (const [name, own] of this.#listeners) {
      for (const listener of process.rawListeners(name) as SignalListener[]) {
        const original = this.#heldBack.get(listener)
        if (!original) continue
        process.off(name, listener) // first, or eleven would cost a warning of Node.js
        process.on(name, original)
      }
      process.off(name, own)
    }
    this.#listeners.clear()
    this.options = undefined
  }

  /** Puts a function that does nothing in place of each listener of others, in their order. To
   *  `process.listeners()` and `process.off()` it looks like the original. Ours is there at any
   *  moment: without any, a signal would end the process or be lost. */
  #holdBack(name: NodeJS.Signals): void {
    const own = this.#listeners.get(name)
    const others = shownListeners(name).filter((listener) => listener !== own)
    const areHeldBack = others.every((listener) => this.#heldBack.has(listener))
    if (!own || areHeldBack) return

    const originals = new Map<NamedListener, SignalListener>()
    // First, as above; from the last one on, since off(f) takes the last that is f or once(f).
    for (const listener of others.slice().reverse()) process.off(name, listener)
    for (const listener of others) {
      const original = this.#heldBack.get(listener) ?? listener
      const place: NamedListener = () => {}
      this.#heldBack.set(place, original)
      originals.set(place, original)
      process.on(name, place)
    }
    // Not before, or off() would have taken it for the original.
    for (const [place, original] of originals) place.listener = unwrapped(original)
  }

  #onSignal(signal: Signal, options: CheckedShutdownOptions): void {
    const nowMs = performance.now()
    if (!this.#first) {
      this.#first = { ...signal, atMs: nowMs }
      monitor.hookServers() // also where it was not started, since a shutdown waits for them
      void this.#shutDown(signal, options)
      return
    }
    if (signal.name === 'SIGINT' && nowMs - this.#first.atMs >= INSIST_MS) {
      options.ending.insist(this.#first)
      return
    }
    if (!this.#isRepeatLogged) log('info', `got ${signal.name} again; it is shutting down already`)
    this.#isRepeatLogged = true
  }

  async #shutDown(signal: Signal, options: CheckedShutdownOptions): Promise<void> {
    const cameAtMs = performance.now()
    const ended = beginShutdown(options, signal.name)
    await ended.done.promise
    if (!this.areHeard) return // somebody has insisted meanwhile
    const leftMs = options.exitAfterMs - (performance.now() - cameAtMs)
    options.ending.finish(signal, ended, leftMs)
  }

  /** Takes our listeners off, and lets the others hear of the signal, as if it came now: each in a
   *  turn of its own, since what one throws is an uncaught exception. Returns whether there are
   *  any. */
  tellOthers({ name, number }: Signal): boolean {
    this.release()
    const others = shownListeners(name)
    for (const other of others) process.nextTick(other.bind(process), name, number)
    return others.length > 0
  }
}

/** Those which `process.listeners()` returns. */
function shownListeners(signal: NodeJS.Signals): SignalListener[] {
  const shown = process.listeners(signal) as SignalListener[]
  const all = process.rawListeners(signal) as SignalListener[]
  return all.filter((each) => shown.includes(unwrapped(each)))
}

/** The raw listener of `once` is a wrapper. */
type NamedListener = SignalListener & { listener?: SignalListener }

function unwrapped(raw: NamedListener): SignalListener {
  return raw.listener ?? raw
}

/** Ends the process in any case, when the others have had their time. */
function endProcess(shutdownOfSignal: Shutdown, othersMs: number): void {
  shutdownOfSignal.unrefServers()
  const closeServers = (): void => shutdownOfSignal.closeServers()
  process.once('beforeExit', closeServers) // nobody has anything left to do
  process.once('exit', closeServers) // also what begins to listen now
  const end = (): void => {
    closeServers()
    setTimeout(exitThoughAlive, ALIVE_MS).unref()
  }
  setTimeout(end, othersMs).unref()
}

/** Says by kind what keeps the process alive: `2 TCPSocketWrap, 1 Timeout`. Pipes and terminals may
 *  just be stdout and stderr, which keep nothing alive, and a channel to the parent process, as PM2
 *  has it, is not worth a warning. */
function exitThoughAlive(): void {
  const all = process.getActiveResourcesInfo?.() ?? [] // Bun has none
  const others = all.filter((kind) => kind !== 'PipeWrap' && kind !== 'TTYWrap')
  const kinds = others.length > 0 ? others : all
  const counts = [...new Set(kinds)].map((kind) => {
    return `${kinds.filter((each) => each === kind).length} ${kind}`
  })
  const shown = counts.join(', ') || 'a connection, a timer or the like'
  const isWorthWarning = others.length > 0 || !process.connected
  if (isWorthWarning) log('warn', `is done, but something keeps the process alive: ${shown}; exits`)
  process.exit()
}

// --- The command table ---------------------------------------------------------------------------

// What lines and HTTP requests name. All commands, ours and the service's own, are entries of one
// kind, and are run in one way.

const commands = new Map<string, Entry>()

/** Whoever sent a line or a request. */
interface Asker extends Connection {
  /** Over HTTP a command has to be offered there. */
  readonly isHttp: boolean
  /** Whether a person sits there, in interactive mode or at a browser; else it is a program. */
  readonly isPerson: boolean
  /** Writes a reply that has, for HTTP, a status and a media type of its own. */
  reply(text: string, code: number, type: string): void
}

/** What follows on its connection, when it has replied. */
type Outcome = Mode | void | Promise<Mode | void>

interface Entry {
  doc: string
  http: boolean
  local: boolean
  /** Whether `help` leaves it out. */
  hidden: boolean
  /** The media type of what it writes. */
  type: string
  run(asker: Asker, args: string[]): Outcome
  /** When a failure of it was logged last. */
  loggedAtMs: number
}

const PLAIN_TEXT = 'text/plain; charset=utf-8'

/** Adds a command, or replaces it. The first line of `doc` is what `help` lists. Throws a
 *  `TypeError` for a name that is empty or has white space in it, and for wrong options. */
export const register: (
  name: string,
  doc: string,
  command: Command,
  options?: CommandOptions
) => void = shared('register', (name, doc, command, options = {}) => {
  mustHaveOnly(options, ['http', 'local'], 'a command takes')
  const { http: overHttp = false, local = false }: CommandOptions = options
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
  const type = commands.get(name)?.type ?? PLAIN_TEXT // a replaced `metrics` is for Prometheus
  addEntry(name, doc, { http: overHttp, local, type }, (asker, args) =>
    continueWith(command(asker, ...args), (mode) => checkedMode(name, mode))
  )
})

interface OwnOptions extends Partial<Omit<Entry, 'doc' | 'run'>> {
  /** What follows on the connection; by default, what was. */
  mode?: Mode
}

/** Adds a command of ours, which returns the text of its reply without the last line feed, or
 *  writes the reply itself. */
function addCommand(
  name: string,
  doc: string,
  command: (asker: Asker, ...args: string[]) => string | void | Promise<string | void>,
  { mode, ...options }: OwnOptions = {}
): void {
  addEntry(name, doc, options, (asker, args) =>
    continueWith(command(asker, ...args), (text) => {
      if (typeof text === 'string') asker.write(`${text}\n`)
      return mode
    })
  )
}

function addEntry(name: string, doc: string, options: Partial<Entry>, run: Entry['run']): void {
  commands.set(name, {
    http: true,
    local: false,
    hidden: false,
    type: PLAIN_TEXT,
    loggedAtMs: -Infinity,
    ...options,
    doc,
    run
  })
}

/** Goes on at once with a value that is no promise. */
function continueWith<T, R>(value: T | Promise<T>, next: (value: T) => R): R | Promise<R> {
  if (!isObject(value)) return next(value as T)
  return Promise.resolve<T>(value).then(next)
}

const MODES: unknown[] = ['quit', 'interactive', 'more', undefined]

function checkedMode(name: string, answer: unknown): Mode | void {
  if (MODES.includes(answer)) return answer as Mode | void
  const returned = `${name} returned ${errorText(answer)} instead of a mode`
  throw new Error(`${returned}; reply with connection.write`)
}

/** Runs a command, for lines and HTTP alike; whatever goes wrong becomes a line for the asker. */
function runCommand(name: string, args: string[], asker: Asker): Outcome {
  const entry = commands.get(name)
  if (!entry || (asker.isHttp && !entry.http)) return refuseUnknown(name, asker)
  if (entry.local && !asker.local) return asker.reply(forThisMachine(name), 403, PLAIN_TEXT)
  try {
    const answer = entry.run(asker, args)
    if (!(answer instanceof Promise)) return answer
    return answer.catch((error: unknown) => refuseFailed(name, error, asker))
  } catch (error) {
    return refuseFailed(name, error, asker)
  }
}

function forThisMachine(name: string): string {
  return `${name} is for this machine only\n`
}

function unknownCommand(name: string): string {
  return `${toRedLine(`Invalid command '${name}'`)}\nTry "help".\n`
}

function refuseUnknown(name: string, asker: Asker): void {
  asker.reply(unknownCommand(name), 404, PLAIN_TEXT)
}

/** The asker gets one line, a stranger none of its details; the frames, which tell of the host's
 *  files, go to the log. */
function refuseFailed(name: string, error: unknown, asker: Asker): void {
  const refusal = attempt(() => (error instanceof Refusal ? error.message : undefined))
  if (refusal !== undefined) {
    asker.reply(`${toRedLine(refusal)}\n`, 500, PLAIN_TEXT)
    return
  }
  const line = `${kindOf(error)}: ${errorText(error)}`
  const shown = asker.local ? line : `Error: ${name} failed`
  asker.reply(`${toRedLine(shown)}\n`, 500, PLAIN_TEXT)

  const entry = commands.get(name)
  const nowMs = performance.now()
  if (!entry || nowMs - entry.loggedAtMs < LOG_MS) return
  entry.loggedAtMs = nowMs
  log('error', `got ${line} from ${name}`, ...framesOf(error))
}

/** A word that ends in `Error`, by which the program knows a failure: `RangeError`, or `Error:
 *  NotFound` of an error that is called `NotFound`. */
function kindOf(error: unknown): string {
  const name: unknown = attempt(() => error instanceof Error && error.name)
  if (typeof name !== 'string' || name === '') return 'Error'
  return /^\w*Error$/.test(name) ? name : `Error: ${name}`
}

// --- Commands ------------------------------------------------------------------------------------

addCommand(
  'help',
  `Get help about server commands

    help lists the commands, help NAME shows what is written about one.
`,
  (asker, name) => {
    if (name === undefined) return listOfCommands()
    const entry = commands.get(name)
    return entry ? `Help for ${name}:\n\n${entry.doc || '?'}` : refuseUnknown(name, asker)
  }
)

function listOfCommands(): string {
  const lines: string[] = []
  for (const [name, { doc, hidden }] of commands) {
    const [summary] = doc.split('\n')
    if (!hidden) lines.push(`  ${name} -- ${summary || '?'}`)
  }
  return ['Supported commands:', ...lines.sort()].join('\n')
}

addCommand(
  'interactive',
  `Turn on monitor's interactive mode

    interactive keeps the connection open for further commands, until quit. An empty line repeats
    the last command.
`,
  () => 'Interactive mode on.  Use "quit" To exit.',
  { http: false, mode: 'interactive' }
)

addCommand(
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

addCommand('livez', 'Prove that the event loop turns', () => 'Alive', { hidden: true })

/** Answers at once if there is nothing to ask. */
function checkHealth(asker: Asker): void | Promise<void> {
  monitor.probers.note(asker, 1)
  if (!isInquiryDue()) return tellVerdict(asker)
  return inquire().then(() => tellVerdict(asker))
}

function tellVerdict(asker: Asker): void {
  const verdict = judgeAndTell()
  if (verdict.healthy) asker.write('OK\n')
  else asker.reply(`${reasonFor(asker, verdict)}\n`, 503, PLAIN_TEXT)
}

/** Whoever reaches the port may know whether the instance is healthy, and the category of the
 *  reason; details are for this machine. */
function reasonFor(asker: Asker, { reason, explanation }: Verdict): string {
  return asker.local ? explanation : reason
}

addCommand('warmup_state', 'Get instance warmup state.', () => {
  const { state } = monitor.warmup
  if (state === 'running') return '0 1'
  return state === 'done' ? '1 0' : '0 0'
})

addCommand(
  'drain',
  `Take the instance out: drain [REASON...]

    Every check is answered REASON until resume. Replies "Drained" when each prober knows and no
    request is in flight.
`,
  async (asker, ...words) => {
    const given = words.length > 0 ? { reason: words.join(' ') } : {}
    return (await untilDrained(toDrainOptions(given), reporterTo(asker))) || DRAINED
  },
  { http: false, local: true }
)

const DRAINED = 'Drained'

/** Tells what changes at once, and what does not every 10 s, since nobody waits for long without a
 *  word. */
function reporterTo(asker: Asker): (progress: string) => void {
  let progressBefore = ''
  let reportedAtMs = -Infinity
  return (progress) => {
    const nowMs = performance.now()
    if (progress === progressBefore && nowMs - reportedAtMs < REPORT_MS) return
    progressBefore = progress
    reportedAtMs = nowMs
    asker.write(`${progress}\n`)
  }
}

addCommand(
  'resume',
  'Take the instance into service again',
  () => {
    if (currentShutdown) failWith('Error: not resumed, since the instance is shutting down')
    resume()
    return 'Resumed'
  },
  { http: false, local: true }
)

// --- The wire: connections -----------------------------------------------------------------------

// A connection begins as one of lines, and goes on as one of HTTP where its first line is of that.
// Both run commands in the same way, and have the same limits.

/** What a connection waits for, each with a limit of its own. */
type SessionState =
  'awaitingRequest' | 'idle' | 'running' | 'awaitingReader' | 'yielding' | 'closing'

const STATE_MS: Record<SessionState, number> = {
  awaitingRequest: SEND_MS, // or a line
  idle: SILENCE_MS, // in interactive mode
  running: COMMAND_MS,
  awaitingReader: COMMAND_MS, // for a client that does not take our replies
  yielding: COMMAND_MS, // to the application and to other connections
  closing: LINGER_MS // until the client closes after us
}

const SESSION = Symbol('session')
type ClientSocket = net.Socket & { [SESSION]?: Session }

function openSession(
  listener: Listener,
  socket: ClientSocket,
  place: number,
  number: number
): void {
  const session = new LineSession(listener, socket, place, number)
  socket[SESSION] = session
  listener.keep(session)
  socket.unref()
  socket.on('error', doNothing) // HAProxy resets every check
  socket.on('data', onData)
  socket.on('end', onEnd)
  socket.on('close', onSocketClose)
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
  const session = this[SESSION]
  session?.listener.forget(session)
}

/** A connection and its limits. */
abstract class Session {
  readonly listener: Listener
  readonly socket: net.Socket
  /** Among all sessions of the listener. */
  readonly place: number
  /** The later it came, the greater; a clock would be read for each check. */
  readonly number: number
  /** Whether it began with a PROXY header: then a balancer asks, perhaps for somebody else. */
  isProxied = false
  state: SessionState = 'awaitingRequest'
  stateSinceTickMs: number

  constructor(listener: Listener, socket: net.Socket, place: number, number: number) {
    this.listener = listener
    this.socket = socket
    this.place = place
    this.number = number
    this.stateSinceTickMs = listener.clock.nowTickMs
  }

  get remoteAddress(): string | undefined {
    return this.socket.remoteAddress
  }

  get local(): boolean {
    if (this.isProxied) return false
    return this.listener.unixSocket !== undefined || isLocalSocket(this.socket)
  }

  enter(state: SessionState): void {
    this.state = state
    this.stateSinceTickMs = this.listener.clock.nowTickMs
  }

  end(): void {
    if (this.state === 'closing') return // a second end() would build an error with its stack
    this.enter('closing')
    this.socket.end()
  }

  enforceLimit(): void {
    const hasUnsentReply = this.state === 'closing' && this.socket.writableLength > 0
    const limitMs = STATE_MS[hasUnsentReply ? 'awaitingReader' : this.state]
    if (this.listener.clock.nowTickMs - this.stateSinceTickMs < limitMs) return
    if (this.state === 'running') this.giveUpCommand()
    else this.cutOff()
  }

  /** Ends at once; by a reset within a reply, so that nobody takes a part of it for the whole. */
  cutOff(): void {
    const isInReply = this.state === 'running' || this.socket.writableLength > 0
    if (isInReply) attempt(() => this.socket.resetAndDestroy()) // Unix sockets have none
    this.socket.destroy()
  }

  /** Tells the asker that its command takes too long, and ends the connection. */
  abstract giveUpCommand(): void
}

function timedOut(name: string | undefined): string {
  return `${toRedLine(`Error: ${name} timed out`)}\n`
}

// --- The wire: lines -----------------------------------------------------------------------------

/** Takes what a balancer may send before any line; returns whether lines may follow. A layer that
 *  knows of such things puts another function in its place. */
let skipPreamble: (lines: LineSession) => boolean = () => true

/** A connection that sends lines. It begins in quit mode: a command, its reply, the end. */
class LineSession extends Session implements Asker {
  readonly isHttp = false
  mode: Mode = 'quit'
  unread: Buffer = NOTHING
  /** Whether what a balancer sends first may still come. */
  isFresh = true
  /** The words of the last command. */
  lastWords: string[] = []

  get isPerson(): boolean {
    return this.mode === 'interactive'
  }

  write(text: string): void {
    if (this.state === 'closing' || this.socket.destroyed) return
    if (this.state === 'running') this.enter('running') // a command that reports has longer
    if (this.socket.writableLength > UNSENT_MAX) this.cutOff()
    else this.socket.write(text)
  }

  reply(text: string): void {
    this.write(text)
  }

  receive(chunk: Buffer): void {
    if (this.state === 'closing') return
    this.unread = this.unread.length > 0 ? Buffer.concat([this.unread, chunk]) : chunk
    if (!this.isReady && this.unread.length > LINE_MAX) this.socket.pause()
    this.serve()
  }

  /** Whether the next line need not wait. */
  get isReady(): boolean {
    return this.state === 'awaitingRequest' || this.state === 'idle'
  }

  /** Takes one line after the other, each when the reply to the one before is done and taken. */
  serve(): void {
    if (this.isFresh) this.isFresh = !skipPreamble(this)
    if (this.isFresh) return
    for (let lines = 0; this.isReady; lines++) {
      if (lines === LINES_PER_TURN) this.yieldTurn()
      else if (this.socket.writableNeedDrain) this.waitForReader()
      else if (!this.serveLine()) return
    }
  }

  waitForReader(): void {
    const { state } = this
    this.enter('awaitingReader')
    this.socket.once('drain', () => {
      if (this.state !== 'awaitingReader') return
      this.enter(state)
      this.yieldTurn() // else a reader who keeps up would leave nothing to the application
    })
  }

  /** Leaves the time to the others; the limit of the state goes on. */
  yieldTurn(): void {
    const { state, stateSinceTickMs } = this
    this.enter('yielding')
    const goOn = (): void => {
      if (this.state !== 'yielding') return
      this.state = state
      this.stateSinceTickMs = stateSinceTickMs
      this.serve()
    }
    setTimeout(goOn, TURN_PAUSE_MS).unref()
  }

  /** Does what the next line asks for; returns whether there was one for us. */
  serveLine(): boolean {
    const { unread, socket } = this
    const feedAt = unread.indexOf(LINE_FEED)
    const isComplete = feedAt >= 0
    const length = isComplete ? feedAt : unread.length
    const line = unread.toString('utf8', 0, length)

    if (this.lastWords.length === 0 && looksLikeHttp(line, isComplete)) {
      becomeHttp(this)
      return false
    }
    if (length > LINE_MAX) {
      this.refuse(LINE_TOO_LONG)
      return false
    }
    if (!isComplete && !socket.readableEnded) {
      socket.resume() // the rest of it
      return false
    }
    if (unread.length === 0) {
      this.end()
      return false
    }
    this.unread = length + 1 < unread.length ? unread.subarray(length + 1) : NOTHING
    this.execute(line.match(WORDS) ?? [])
    return true
  }

  /** An empty line repeats the last command; in `more` mode every line is its arguments. */
  execute(words: string[]): void {
    const isMore = this.mode === 'more'
    if (!isMore && words.length > 0) this.lastWords = words
    const [name, ...args] = this.lastWords
    if (name === undefined) return

    this.enter('running')
    const answer = runCommand(name, isMore ? words : args, this)
    if (answer instanceof Promise) void this.followLater(answer)
    else this.follow(answer)
  }

  async followLater(answer: Promise<Mode | void>): Promise<void> {
    this.follow(await answer)
    if (this.isReady) this.yieldTurn()
  }

  follow(mode: Mode | void): void {
    if (mode) this.mode = mode
    if (this.mode === 'quit') {
      this.end()
      return
    }
    if (this.state === 'closing') return
    this.enter('idle')
    this.socket.setNoDelay() // else replies to pipelined lines would wait for the client's ACKs
  }

  giveUpCommand(): void {
    this.refuse(timedOut(this.lastWords[0]))
  }

  refuse(text: string): void {
    this.write(text)
    this.end()
  }
}

const LINE_TOO_LONG = 'Line too long\n'
const NOTHING = Buffer.alloc(0)
const LINE_FEED = 0x0a
const WORDS = /\S+/g // health_check, or drain until noon

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
httpServer.keepAliveTimeout = SEND_MS // Node.js's 5 s are just the pause of many a prober
httpServer.on('dropRequest', (_, socket) => socket.pause()) // those before it are answered

/** Hands the connection over to Node.js's HTTP server, with all that was read of it. */
function becomeHttp(lines: LineSession): void {
  const { listener, unread } = lines
  const socket: ClientSocket = lines.socket
  const session = new HttpSession(lines)
  socket[SESSION] = session
  listener.keep(session)
  // Our own listeners stay, and find that the session is not theirs.
  httpServer.emit('connection', socket)
  socket.emit('data', unread) // by unshift() it would take a detour
}

function onMonitorRequest(request: http.IncomingMessage, response: http.ServerResponse): void {
  const { [SESSION]: session } = request.socket as net.Socket & { [SESSION]: HttpSession }
  session.accept(new Exchange(session, response))
}

/** A connection that sends HTTP. Its requests are answered one after the other. */
class HttpSession extends Session {
  readonly waiting: Exchange[] = []
  current: Exchange | undefined
  requests = 0

  constructor(lines: LineSession) {
    super(lines.listener, lines.socket, lines.place, lines.number)
    this.isProxied = lines.isProxied
    this.stateSinceTickMs = lines.stateSinceTickMs // its head has 60 s since the connection came
  }

  accept(exchange: Exchange): void {
    this.requests++
    if (this.requests === REQUESTS_PER_CONNECTION) this.endAfter(exchange)
    this.waiting.push(exchange)
    if (!this.current) this.answerNext()
  }

  /** The connection ends behind this answer, or Node.js would send a 503 for each request that is
   *  dropped. It would destroy the socket, too: where something is unread, that is a reset, by
   *  which a client may lose answers. */
  endAfter({ response }: Exchange): void {
    response.shouldKeepAlive = false
    this.socket.destroySoon = (): void => this.end()
  }

  answerNext(): void {
    if (this.state === 'closing' || this.socket.destroyed) return
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
    if (this.state === 'running') this.finish(exchange) // else given up meanwhile
  }

  /** The next request waits until this reply is taken, and until the application has had its
   *  turn. */
  finish(exchange: Exchange): void {
    const { response } = exchange
    this.enter('awaitingReader')
    // Without keep-alive nothing follows: Node.js ends the connection.
    if (response.shouldKeepAlive)
      response.once('finish', () => setImmediate(() => this.answerWhatWaits()))
    exchange.send()
  }

  answerWhatWaits(): void {
    if (this.state === 'closing') return
    this.current = undefined
    this.enter('awaitingRequest')
    this.answerNext()
  }

  giveUpCommand(): void {
    const { current } = this
    this.current = undefined
    current?.reply(timedOut(current.name), 500, PLAIN_TEXT)
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
  #code = 200
  /** The media type, where it is not that of the command. */
  #type: string | undefined
  #body = ''

  constructor(session: HttpSession, response: http.ServerResponse) {
    const { name, args } = parseCommand(response.req.url ?? '')
    this.session = session
    this.response = response
    this.name = name || nameOfRoot(response.req.headers)
    this.args = args
  }

  get remoteAddress(): string | undefined {
    return this.session.remoteAddress
  }

  get isPerson(): boolean {
    return isForPerson(this.response.req.headers)
  }

  get local(): boolean {
    return isLocalOperator(this.response.req, this.session)
  }

  run(): Outcome {
    const { method = '' } = this.response.req
    if (method !== 'GET' && method !== 'HEAD') {
      const allowed = { Allow: 'GET, HEAD' }
      this.reply('Only GET and HEAD are answered here\n', 405, PLAIN_TEXT, allowed)
      return
    }
    return runCommand(this.name, this.args, this)
  }

  write(text: string): void {
    if (this.response.headersSent) return
    if (this.#body.length > UNSENT_MAX) this.session.cutOff()
    else this.#body += text
  }

  /** The headers are sent besides those that every answer has. */
  reply(text: string, code: number, type: string, headers: Record<string, string> = {}): void {
    if (this.response.headersSent) return
    this.write(text)
    this.#code = code
    this.#type = type
    for (const [name, value] of Object.entries(headers)) this.response.setHeader(name, value)
  }

  send(): void {
    if (this.response.headersSent) return
    const type = this.#type ?? commands.get(this.name)?.type ?? PLAIN_TEXT
    this.response.writeHead(this.#code, headersFor(type, this.#body))
    this.response.end(this.#body)
  }
}

function headersFor(type: string, body: string): http.OutgoingHttpHeaders {
  return {
    'Content-Type': type,
    'Content-Length': Buffer.byteLength(body),
    'Cache-Control': 'no-store',
    'X-Content-Type-Options': 'nosniff'
  }
}

/** The command that `/` names. A layer that has a page for browsers puts another function in its
 *  place. */
let nameOfRoot: (headers: http.IncomingHttpHeaders) => string = () => 'help'

/** Reads `/NAME/ARG…?QUERY`; the name is '' of `/`. */
function parseCommand(target: string): { name: string; args: string[] } {
  if (PLAIN_PATH.test(target)) return { name: target.slice(1), args: [] }

  const { path } = parseTarget(target)
  const parts = attempt(() => path.split('/').filter(Boolean).map(decodeURIComponent))
  const [name = '', ...args] = parts ?? [path] // no command has a name that cannot be decoded
  return { name, args }
}

const PLAIN_PATH = /^\/\w+$/ // /health_check, where nothing is to be taken apart or decoded

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

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null
}

function hasMethods(value: unknown, ...names: string[]): boolean {
  return isObject(value) && names.every((name) => typeof value[name] === 'function')
}

/** The error names what is no option, and those that there are. */
function mustHaveOnly(
  options: unknown,
  names: string[],
  whoTakes: string
): asserts options is object {
  const sentence = `${whoTakes} an object with any of ${names.join(', ')}`
  must(isObject(options), sentence)
  const surplus = Object.keys(options).find((name) => !names.includes(name))
  must(surplus === undefined, `there is no option ${surplus}: ${sentence}`)
}

function mayHaveMethod(value: object, name: string): boolean {
  return Reflect.get(value, name) === undefined || hasMethods(value, name)
}

/** Text without white space or control characters. */
function isWord(name: unknown): boolean {
  return typeof name === 'string' && /^[^\s\p{C}]+$/u.test(name)
}

/** A method to be called by `Reflect.apply`, which says whose it is. */
function methodOf<T extends object, Name extends keyof T>(owner: T, name: Name): T[Name] {
  return owner[name]
}

/** Replaces a method of somebody else's by what `wrap` makes of it. Returns what takes that back:
 *  then the object is as it was, or, where somebody has wrapped our method since, that does nothing
 *  any more. Returns undefined where the method cannot be replaced. */
function replaceMethod<Owner extends object, Name extends keyof Owner>(
  owner: Owner,
  name: Name,
  wrap: (inner: Owner[Name] & Callable) => Callable
): (() => void) | undefined {
  const before = Object.getOwnPropertyDescriptor(owner, name)
  const innerBefore = owner[name] as Owner[Name] & Callable
  // What is inherited is looked up each time, since somebody may replace it, too.
  const inner = before ? innerBefore : inheritedMethod(owner, name)
  let method: Callable = wrap(inner)
  function replacement(this: unknown, ...args: unknown[]): unknown {
    return Reflect.apply(method, this, args)
  }
  const descriptor = { value: replacement, configurable: true, writable: true }
  if (!Reflect.defineProperty(owner, name, descriptor)) return undefined

  return () => {
    method = inner
    if ((owner[name] as unknown) !== replacement) return
    // Reflect's functions never throw, whatever became of the owner.
    Reflect.deleteProperty(owner, name)
    if (before) Reflect.defineProperty(owner, name, before)
  }
}

type Callable = (this: never, ...args: never[]) => unknown

function inheritedMethod<Owner extends object, Name extends keyof Owner>(
  owner: Owner,
  name: Name
): Owner[Name] & Callable {
  function inherited(this: unknown, ...args: unknown[]): unknown {
    const method: Callable = Reflect.get(Object.getPrototypeOf(owner) as object, name)
    return Reflect.apply(method, this, args)
  }
  return inherited as Owner[Name] & Callable
}

/** Returns undefined if the function throws, as getters and methods of foreign objects may. */
function attempt<T>(act: () => T): T | undefined {
  try {
    return act()
  } catch {
    return undefined
  }
}

/** The same for what is ours, and is not to fail: that it did is logged now and then, since what
 *  fails at each request would flood the log. */
function attemptOwn<T>(act: () => T): T | undefined {
  try {
    return act()
  } catch (error) {
    logFault(error)
    return undefined
  }
}

function logFault(error: unknown): void {
  const nowMs = performance.now()
  if (nowMs - faultLoggedAtMs < FAULT_LOG_MS) return
  faultLoggedAtMs = nowMs
  log('error', `has an internal error: ${errorText(error)}`, ...framesOf(error))
}

let faultLoggedAtMs = -Infinity

/** Takes the target of a request apart: `/shop?now`, or `http://host/shop?now` of a client that
 *  takes us for its proxy. */
function parseTarget(target: string): { path: string; query: string } {
  const local = target.startsWith('/') ? target : target.replace(ORIGIN, '')
  const queryAt = local.indexOf('?')
  if (queryAt < 0) return { path: local, query: '' }
  return { path: local.slice(0, queryAt), query: local.slice(queryAt + 1) }
}

const ORIGIN = /^https?:\/\/[^/?]*/i // http://host:8160 of an absolute target (RFC 9112, 3.2.2)

// Promises and time

const TIMED_OUT = new Error('no answer in time')

/** Rejects with TIMED_OUT what does not settle in time. It waits for the limit in two halves:
 *  while the application blocks the event loop no answer can be read, but that spoils only
 *  one of them. */
function withinLimit<T>(promise: Promise<T>, limitMs: number): Promise<T> {
  const halfMs = Math.max(0, limitMs) / 2
  return new Promise((resolve, reject) => {
    // setImmediate: after the application has blocked, read first what came in time.
    const timeOut = (): unknown => setImmediate(reject, TIMED_OUT)
    const waitAgain = (): void => {
      timer = setTimeout(timeOut, halfMs).unref()
    }
    let timer = setTimeout(waitAgain, halfMs).unref()
    const endWait = (): void => clearTimeout(timer)
    promise.then(resolve, reject)
    promise.then(endWait, endWait)
  })
}

/** Resolves to true as soon as something holds, to false if it does not in time. */
async function pollUntil(holds: () => boolean, limitMs: number): Promise<boolean> {
  const startedAtMs = performance.now()
  while (!holds()) {
    if (performance.now() - startedAtMs >= limitMs) return false
    await unreffedPause(POLL_MS)
  }
  return true
}

/** Whether the event loop has just been round with next to nothing to do: then it has read what
 *  came before, and nothing can have come since but in that short time. */
async function isTurnShort(): Promise<boolean> {
  const beganAtMs = performance.now()
  await new Promise((resolve) => setImmediate(resolve))
  return performance.now() - beganAtMs < SHORT_TURN_MS
}

/** A promise that is resolved from outside. Node.js 20 has no `Promise.withResolvers`. */
function deferred<T>(): { promise: Promise<T>; resolve: (value: T) => void } {
  let resolve: (value: T) => void = doNothing
  const promise = new Promise<T>((resolvePromise) => {
    resolve = resolvePromise
  })
  return { promise, resolve }
}

function unreffedPause(ms: number): Promise<void> {
  return new Promise((resolve) => {
    setTimeout(resolve, ms).unref()
  })
}

// The environment

function readEnv(name: string): string | undefined {
  return process.env[name]?.trim() || undefined
}

/** What the environment says, as `read` understands it; undefined where it says nothing. */
function readEnvAs<T>(
  name: string,
  read: (text: string) => T | undefined,
  sentence: string
): T | undefined {
  const text = readEnv(name)
  if (text === undefined) return undefined
  const shown = text.replace(/^.*@/s, '***@') // perhaps a password, and no URL that shows where
  return read(text) ?? failWith(`cannot use ${name}=${shown}: it ${sentence}`)
}

/** A wrong value costs a warning, and is left out. */
function readMilliseconds(name: string, byDefault: number): number
function readMilliseconds(name: string, byDefault?: number): number | undefined
function readMilliseconds(name: string, byDefault?: number): number | undefined {
  const text = readEnv(name)
  if (text === undefined) return byDefault
  const milliseconds = Number(text)
  if (milliseconds >= 0 && milliseconds <= MILLISECONDS_MAX) return milliseconds
  const range = `a number of milliseconds from 0 to ${MILLISECONDS_MAX}`
  const used = byDefault === undefined ? '' : `; uses ${byDefault}`
  log('warn', `cannot use ${name}=${text}: it must be ${range}${used}`)
  return byDefault
}

/** A path, perhaps with a query. Without control characters, which a name must not have. */
function isUsablePage(page: string): boolean {
  return PAGE_START.test(page) && isWord(page)
}

const PAGE_START = /^\/(?![/\\])/ // of /search?q=a, but not of //example.org

function isSitePath(path: unknown): boolean {
  return typeof path === 'string' && isUsablePage(path) && !/[?#]/.test(path)
}

function isSwitchedOff(name: string): boolean {
  return /^(0|false|no|off)$/i.test(readEnv(name) ?? '')
}

// Texts and errors

function withoutSlashes(path: string): string {
  return path.replace(/\/+$/, '')
}

/** Replaces each character that could forge a line or steer a terminal by a blank, since without it
 *  two words might join to a third one. Hides passwords, too. */
function clean(text: string): string {
  return withoutPasswords(text).replace(CONTROL_CHARACTER, ' ')
}

/** Texts of errors repeat the URLs that clients of databases were given. */
function withoutPasswords(text: string): string {
  return text.replace(/\S+/g, (word) => withoutLongPassword(word.replace(CREDENTIALS, '//***@')))
}

/** A password may hold anything, slashes too, so what ends it is the last `@`. */
function withoutLongPassword(word: string): string {
  const beginsAt = word.indexOf('//') + 2
  const endsAt = word.lastIndexOf('@')
  if (beginsAt < 2 || endsAt < beginsAt) return word
  if (PATH_BEFORE_AT.test(word.slice(beginsAt, endsAt))) return word
  return `${word.slice(0, beginsAt)}***${word.slice(endsAt)}`
}

const CREDENTIALS = /\/\/[^\s/@][^\s/]*@/g // of postgres://user:password@host

/** Of `http://localhost:8080/@@warmup`, `https://registry.npmjs.org/@types/node` and
 *  `file:///srv/name@1.0`. */
const PATH_BEFORE_AT = /^(?:\/|(?:\*\*\*@)?(?:\[[\da-f:]+\]|[^/:@]+)(?::\d+)?\/(?:.*\/)?@*$)/

const CONTROL_CHARACTER = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu

function plural(count: number, one: string, many: string): string {
  return `${count} ${count === 1 ? one : many}`
}

/** Describes whatever was thrown; never returns an empty text. */
function errorText(error: unknown): string {
  return attempt(() => describeError(error)) || 'an error that cannot be put into words'
}

function describeError(error: unknown): string {
  if (!(error instanceof Error)) return boundedText(error)

  const { message, cause, code, name } = error as NodeJS.ErrnoException
  if (message === 'fetch failed' && cause) return errorText(cause)
  const [first]: unknown[] = error instanceof AggregateError ? error.errors : []
  if (message === '' && first !== undefined) return errorText(first)
  const text = [message, code, name].find(Boolean)
  const advice = advisers.map((advise) => advise(message, String(code)))
  return boundedText(text) + advice.join('')
}

/** What might help against an error, '' if that is not known. Layers add to it. */
const advisers: ((message: unknown, code: string) => string)[] = []

/** Hides passwords before it cuts, since half of one is not known for what it is. */
function boundedText(value: unknown): string {
  return withoutPasswords(String(value)).slice(0, REASON_MAX)
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
  const bounded = lines.map((line) => clean(line).slice(0, LOG_LINE_MAX))
  const text = `ftw-monitor ${bounded.join('\n')}`
  void logSafely(monitor.logger, level, text)
}

async function logSafely(logger: Logger, level: keyof Logger, text: string): Promise<void> {
  try {
    const logged: unknown = logger[level](text) // which may be a promise
    await logged
  } catch {
    // There is nobody left to tell.
  }
}

// --- The module ----------------------------------------------------------------------------------

// What we replace of somebody else's, and when we put it back. Where somebody has wrapped it since,
// ours stays below that, and does nothing any more. Each layer says at its head what it replaces.
//
//   `emit` of each server      from `start` on; back at `stop` and at the end of a shutdown
//   listeners of the signals   from `shutdownOnSignal` on; back at `stop`, and before the signal is
//                              let through
//   `writeHead` of a response  while clients are sent elsewhere; it goes with the response
//   `_handle` of a server      when it stops listening; gone when the program closes the server, or
//                              else at the end of the shutdown

// How a layer adds to the core. What an extension fails in is logged, and harms neither core nor
// host; what is put in place of a function of the core must not fail.
//
//   an extension of each monitor          `extensionMakers`: hears of its life and traffic
//   servers that `start` was not given    `Monitor.allTraffic`, `answerStart`, `open`, `accept`
//   connections, requests of its own      `Traffic.addClient`, `moveClient`, `remove`, `adopt`,
//                                         `keepBusy`, `openRequests`, `isSending`
//   how a server stops listening          `stopListening`, `closeQuietConnections`
//   what a signal does                    an `Ending` for `signals.listen`; `signals.tellOthers`
//   options, and where one is needed      `optionChecks`, `serversNeeded`
//   what databases count, and know        `databaseMethods`, `activityOf`
//   when an answer may be late            `Dependency.isPremature`, `isCold`, `wasColdAt`
//   performers where there are none       `defaultPerformers`, `beginNow`
//   commands, and the page at `/`         `addCommand`, `addEntry`, `nameOfRoot`
//   what comes before the first line      `skipPreamble`, `Session.isProxied`
//   advice, names of requests, exports    `advisers`, `describeRequests`, `shared`

const signals = new Signals()

/** The shutdown that has begun, also when it is over; `start` forgets it. */
let currentShutdown: Shutdown | undefined

/** One that was never begun stands for none. */
let monitor = new Monitor({ servers: [] }, 'new')

// --- Layer: unmodified programs; all from here on may be deleted, and nothing above refers to it -

//   Servers that listen
//   Servers that start() was not given
//   Instances behind a port
//   Connections that came earlier
//   Servers of Bun
//   Copies that differ
//   Mistyped variables
//   Monitors that are switched off
//   Programs that nobody edits
//
// What serves programs as they are: where nobody passes a server to `start`, where it comes late,
// or has listened for long, and where nobody calls `start`. It replaces, besides:
//
//   `listen` of `net.Server`   from `start` on; back at `stop` and at the end of a shutdown
//   `close`, `emit` and        on Bun alone, in place of `_handle`
//   `listening` of a server

/** Gives an extension to the current monitor, and to each one from now on. */
function extend(make: (owner: Monitor) => Extension): void {
  extensionMakers.push(make)
  monitor.extensions.add(make(monitor))
}

// --- Servers that listen -------------------------------------------------------------------------

// Which servers listen in this process: from now on by their `listen`, and already as far as the
// runtime tells.

interface ListenObserver {
  /** Something is about to listen at this place. */
  onListen(wanted: Endpoint): void
  onListening(server: net.Server): void
}

/** Tells an observer of each server of this process that begins to listen; returns a function that
 *  ends this. */
function observeListening(observer: ListenObserver): () => void {
  // On Bun the http servers have a `listen` of their own.
  const prototypes = [net.Server.prototype, http.Server.prototype]
  const own = prototypes.filter((prototype) => Object.hasOwn(prototype, 'listen'))
  const observers = new Set([observer])
  const restores = own.map((prototype) => {
    return replaceMethod(prototype, 'listen', (inner) => observedListen(inner, observers))
  })
  return () => {
    observers.clear()
    for (const restore of restores) restore?.()
  }
}

function observedListen(inner: Callable, observers: Set<ListenObserver>): Callable {
  const awaited = new WeakSet<net.Server>()
  const onListening = (server: net.Server): void => {
    awaited.delete(server)
    // `unref()` comes after `listen()`, and tells that it is not the instance.
    setImmediate(() => {
      if (!server.listening) return
      for (const observer of observers) attemptOwn(() => observer.onListening(server))
    })
  }
  return function listen(this: net.Server, ...args: unknown[]): unknown {
    if (MONITOR_SERVER in this) return Reflect.apply(inner, this, args)
    const isAwaited = awaited.has(this) // since an earlier try, which failed
    if (!isAwaited) this.once('listening', () => onListening(this))
    awaited.add(this)
    const wanted = attempt(() => placeOf(args)) ?? {}
    for (const observer of observers) attemptOwn(() => observer.onListen(wanted))
    return Reflect.apply(inner, this, args)
  }
}

/** Where a call of `listen` wants to listen; of a handle and the like nothing is known. */
function placeOf([first, second]: unknown[]): Endpoint {
  if (isObject(first)) {
    const { path, port, host } = first as Endpoint
    return path === undefined ? { port: Number(port), host: host ?? '' } : { path }
  }
  if (typeof first === 'string' && Number.isNaN(Number(first))) return { path: first }
  return { port: Number(first), host: typeof second === 'string' ? second : '' }
}

/** Those that listen already, as far as the runtime tells. */
function listeningServers(): net.Server[] {
  return activeHandles()
    .filter(isServer)
    .filter(({ listening }) => listening)
}

function activeHandles(): unknown[] {
  const { _getActiveHandles }: { _getActiveHandles?: () => unknown[] } = Object(process)
  return attempt(() => _getActiveHandles?.call(process)) ?? []
}

/** Neither our own port, nor the primary of a cluster. */
function servesRequests(server: net.Server): boolean {
  return server.listenerCount('request') > 0 || server.listenerCount('stream') > 0
}

/** A metrics exporter, say, does not. */
function keepsProcessAlive(server: net.Server): boolean {
  const { _unref, _handle } = server as {
    _unref?: boolean
    _handle?: { hasRef?: () => boolean } | null
  }
  return _unref !== true && _handle?.hasRef?.() !== false
}

// --- Servers that start() was not given ----------------------------------------------------------

// Where `start` was given none, the instance is the first server that serves requests and keeps the
// process alive. At a signal a shutdown closes all that listen.

/** Looks for servers on behalf of a monitor. */
class ServerSearch implements Extension {
  readonly #owner: Monitor
  /** Servers that are not the instance: at a signal they are closed, and waited for. */
  readonly #bystanders: Traffic
  /** Set while servers that listen are seen. */
  #endObserving: (() => void) | undefined
  /** Until it warns of a server that listens elsewhere than `PORT`. */
  #portWarning: ReturnType<typeof setTimeout> | undefined

  constructor(owner: Monitor) {
    this.#owner = owner
    const observer: ServerObserver = {
      onServerListening: doNothing,
      onServerClose: (server) => this.#bystanders.remove(server) // it may be collected as garbage
    }
    this.#bystanders = new Traffic(observer, owner.extensions)
    owner.allTraffic.push(this.#bystanders)
  }

  findServers(): void {
    this.#endObserving ??= observeListening({
      onListen: (place) => this.#stepAside(place),
      onListening: (server) => this.#onServerFound(server)
    })
    for (const server of listeningServers()) this.#onServerFound(server)
  }

  onUnhook(): void {
    this.#endObserving?.()
    this.#endObserving = undefined
    clearTimeout(this.#portWarning)
  }

  #onServerFound(server: net.Server): void {
    const { traffic } = this.#owner
    if (traffic.has(server) || !servesRequests(server)) return
    if (this.#isInstance(server)) {
      traffic.unhook()
      traffic.add(server)
      this.#owner.onServerListening(server)
      return
    }
    if (signals.areHeard || signals.hasCome) this.#bystanders.add(server)
    if (isSearching(this.#owner) && keepsProcessAlive(server)) this.#warnOfPortLater(server)
  }

  /** Where `start` was given no server, it is the one at the port that is known, or the first. */
  #isInstance(server: net.Server): boolean {
    const { options, traffic } = this.#owner
    const isGiven = options.servers.length > 0
    if (isGiven || traffic.server?.listening || !keepsProcessAlive(server)) return false
    const wanted = attempt(() => toldAddress(options))
    const found = boundAddress({}, server)
    return !wanted || (wanted.port === found.port && wanted.path === found.path)
  }

  /** The program may not heed PORT; or it listens there, too, but later. One warning is enough. */
  #warnOfPortLater(server: net.Server): void {
    if (this.#portWarning) return
    const warn = (): void => {
      if (!isSearching(this.#owner)) return
      if (!server.listening) {
        this.#portWarning = undefined
        return
      }
      const place = describeAddress(server.address() ?? '')
      const port = readEnv('PORT')
      log('warn', `finds no server at PORT=${port}, but one at ${place}: set PORT to that`)
    }
    this.#portWarning = setTimeout(warn, LISTEN_WARNING_MS).unref()
  }

  /** A program that could listen there without us can do so with us. */
  #stepAside(wanted: Endpoint): void {
    const { address, listener } = this.#owner
    if (!listener || !address || !isInTheWay(address, wanted)) return
    void listener.close()
    this.#owner.listener = undefined
    const place = describeAddress(address)
    log('warn', `gives ${place} to the program, which listens there: set FTW_MONITOR_LISTEN`)
  }
}

/** Whether nobody else can listen at the wanted place; of a name it is not known which address it
 *  stands for. */
function isInTheWay(address: net.AddressInfo | string, wanted: Endpoint): boolean {
  if (typeof address === 'string') return wanted.path === address
  const { port, host = '' } = wanted
  if (port !== address.port) return false
  const isOneAddressEach = [host, address.address].every((each) => isOneAddress(each))
  return !isOneAddressEach || host === address.address
}

/** Neither a name nor any address. */
function isOneAddress(host: string): boolean {
  return net.isIP(host) > 0 && host !== '::' && host !== '0.0.0.0'
}

/** What an instance is bound to by its options and the environment alone. */
function toldAddress({ port }: { port?: number }): Bound {
  const text = readEnv('PORT')
  if (port === undefined && isPath(text)) return { address: '', port, path: text }
  const instancePort = port ?? readEnvAs('PORT', toPort, PORT_SENTENCE)
  if (instancePort === undefined) failWith('needs a port: set PORT, or start(server)')
  return { address: readEnv('HOST') ?? '', port: instancePort, path: undefined }
}

/** A port that can be connected to. */
function toPort(text: string): number | undefined {
  const port = Number(text)
  return isPort(port) && port > 0 ? port : undefined
}

serversNeeded = 0
extend((owner) => new ServerSearch(owner))

// --- Instances behind a port ---------------------------------------------------------------------

// Where the port is known, and the server is not found in this process, it may be that of a child
// process. Whether such an instance accepts connections only a connection can tell.

const ACCEPT_WARNING_MS = 20_000 // ftw.monitor's grace
const CONNECT_MS = 900 // to connect to the instance; Kubernetes waits for one second
const CONNECT_AGAIN_MS = 1_000 // so that many probers cost one connection a second

class PortWatch implements Extension {
  readonly #owner: Monitor
  #connectedAtMs = -Infinity
  #pendingConnect: Promise<void> | undefined

  constructor(owner: Monitor) {
    this.#owner = owner
    owner.allTraffic.unshift(new UnseenTraffic(owner, this))
  }

  /** While it boots it is looked for, by the clock of the monitor. */
  onTick(): void {
    const { server, state, options, warmup } = this.#owner
    if (server) return
    if (state === 'waiting' && isPortKnown(options)) this.#open()
    if (this.#owner.state === 'booting') void this.inquire()
    if (warmup.state === 'running' && this.isInquiryDue) void this.inquire()
  }

  get isInquiryDue(): boolean {
    const { server, instance } = this.#owner
    if (server || !instance) return false
    return performance.now() - this.#connectedAtMs > CONNECT_AGAIN_MS
  }

  /** Connects once. Callers that come while a connection is tried share its outcome. */
  inquire(): Promise<void> {
    this.#pendingConnect ??= this.#connect()
    return this.#pendingConnect
  }

  #open(): void {
    const owner = this.#owner
    this.#connectedAtMs = -Infinity
    try {
      owner.open(toldAddress(owner.options))
    } catch (error) {
      owner.giveUp(error)
    }
    owner.clock.schedule(ACCEPT_WARNING_MS, () => {
      if (owner.state === 'booting') log('warn', `finds nothing at ${owner.instance?.url}`)
    })
  }

  async #connect(): Promise<void> {
    const { instance } = this.#owner
    if (!instance) return
    const { host, port = 0, path } = instance.location
    const outcome = await connectionOutcome(path === undefined ? { host, port } : { path })
    this.#pendingConnect = undefined
    this.#connectedAtMs = performance.now()
    if (instance !== this.#owner.instance) return
    // Of a full backlog, say, nothing is to be learned: what was seen last still holds.
    if (outcome !== 'unknown') instance.isRefusing = outcome === 'refusing'
    if (outcome === 'accepting') this.#owner.accept()
  }
}

/** Also where it is known wrongly, of which the opening tells. */
function isPortKnown({ port }: CheckedStartOptions): boolean {
  return port !== undefined || readEnv('PORT') !== undefined
}

/** The requests of a server that is not in this process, or whose events cannot be seen. */
class UnseenTraffic extends Traffic {
  readonly #owner: Monitor
  readonly #watch: PortWatch

  constructor(owner: Monitor, watch: PortWatch) {
    super(owner, new Extensions())
    this.#owner = owner
    this.#watch = watch
  }

  /** Of its requests nothing can be known, so they have all the time. */
  override async beginClosing(limitMs: number): Promise<void> {
    if (!this.#isThere) return
    const seconds = Math.round(limitMs / 1_000)
    log('warn', `waits ${seconds} s for requests that it cannot see: pass the server to start()`)
  }

  override closeQuietConnections(): boolean {
    if (this.#watch.isInquiryDue) void this.#watch.inquire()
    return !this.#isThere
  }

  get #isThere(): boolean {
    const { traffic, state, isInstanceClosing } = this.#owner
    return !traffic.server && state === 'accepting' && !isInstanceClosing
  }
}

function connectionOutcome(to: net.NetConnectOpts): Promise<'accepting' | 'refusing' | 'unknown'> {
  return new Promise((resolve) => {
    const socket = attempt(() => net.connect(to)) // it throws where permissions forbid it
    if (!socket) {
      resolve('unknown')
      return
    }
    socket.unref()
    socket.setTimeout(CONNECT_MS, () => {
      socket.destroy()
      resolve('unknown')
    })
    socket.on('connect', () => {
      socket.destroy()
      resolve('accepting')
    })
    socket.on('error', (error) => resolve(isConnectionRefused(error) ? 'refusing' : 'unknown'))
  })
}

type ConnectionError = NodeJS.ErrnoException & { address?: string }

/** A name may have several addresses, and an error for each. */
function isConnectionRefused(error: ConnectionError & { errors?: ConnectionError[] }): boolean {
  const { errors = [error] } = error
  const codes = errors.flatMap(({ code = '', address }) => {
    return address === '::1' && NO_IPV6.has(code) ? [] : [code]
  })
  return codes.length > 0 && codes.every((code) => REFUSED.has(code))
}

const REFUSED = new Set(['ECONNREFUSED', 'ENOENT']) // ENOENT: of a Unix socket
const NO_IPV6 = new Set(['EADDRNOTAVAIL', 'EAFNOSUPPORT', 'ENETUNREACH'])

extend((owner) => new PortWatch(owner))

// --- Connections that came earlier ---------------------------------------------------------------

// A server may have connections when it is hooked. Of one by TLS or HTTP/2, only the socket can be
// found then; of others, Node.js itself keeps at the socket what is being answered.

/** A connection of which nothing is known until its next request comes. */
class EarlierClient extends Client {
  readonly #traffic: Traffic

  constructor(socket: net.Socket, traffic: Traffic) {
    super(socket, 'handshaking')
    this.#traffic = traffic
  }

  get isUnseen(): boolean {
    return this.state === 'handshaking'
  }

  override get isBusy(): boolean {
    return this.isUnseen || super.isBusy
  }

  /** It may be anything, so it stays, as what was upgraded does. */
  override cut(): boolean {
    if (this.isUnseen) this.state = 'upgraded'
    return super.cut()
  }

  /** Node.js itself may know whether it is idle. But it also takes a connection for idle that still
   *  sends its answer, so we wait until none that we know of does. */
  override sampleQuiet(): void {
    super.sampleQuiet()
    const { servers, clients, requestsInFlight } = this.#traffic
    if (!this.isUnseen || requestsInFlight > 0) return
    if (clients.some(({ state, isBusy }) => state === 'serving' && isBusy)) return
    for (const server of servers as http.Server[]) attempt(() => server.closeIdleConnections?.())
  }
}

extend(() => ({
  onServer(traffic, server) {
    for (const socket of connectionsOf(server)) addEarlier(traffic, server, socket)
  },
  onEvent(traffic, _server, event, args) {
    if (event === 'stream') recogniseSession(traffic, (args[0] as Http2Stream).session)
    return undefined
  }
}))

function addEarlier(traffic: Traffic, server: net.Server, socket: EarlierSocket): void {
  if (isSecure(server) || speaksHttp2(server, socket)) {
    const unseen = traffic.addClient(new EarlierClient(socket, traffic))
    const session = sessionOf(socket)
    if (session) traffic.moveClient(unseen, session)
    return
  }
  const client = traffic.addClient(new Client(socket, socket.parser ? 'serving' : 'upgraded'))
  const { _httpMessage: response } = socket
  if (response && !response.writableFinished) traffic.adopt(response, client)
}

/** A session of HTTP/2 may be that of an earlier connection. */
function recogniseSession(traffic: Traffic, session: Http2Session | undefined): void {
  if (!session || traffic.knows(session)) return
  const unseen = traffic.clients.filter((each) => each instanceof EarlierClient && each.isUnseen)
  const port = attempt(() => session.socket?.remotePort)
  const client = unseen.find(({ connection }) => {
    return 'remotePort' in connection && connection.remotePort === port
  })
  if (client) traffic.moveClient(client, session)
}

/** As far as the runtime tells. */
function connectionsOf(server: net.Server): EarlierSocket[] {
  const sockets = activeHandles().filter((handle) => handle instanceof net.Socket)
  return sockets.filter((socket: net.Socket & { server?: unknown }) => socket.server === server)
}

/** The session of HTTP/2 that a connection carries. Node.js keeps it there by a key that has no
 *  name. */
function sessionOf(socket: net.Socket): Http2Session | undefined {
  const values = Reflect.ownKeys(socket).map((key) => attempt(() => Reflect.get(socket, key)))
  return values.find((value) => hasMethods(value, 'goaway', 'close')) as Http2Session | undefined
}

// --- Servers of Bun ------------------------------------------------------------------------------

// Bun has no handle to close. Servers stop listening only by their `close()`, which finishes what
// is being served, but cuts answers that are not taken yet. So it is called at a moment when there
// are none. The stand-in is a `close()` that waits for ours, of which nobody hears before.

/** Closes a server when no answer has been written that is not taken yet. */
async function closeOnBun(server: net.Server, traffic: Traffic): Promise<void> {
  while (traffic.isSending && server.listening) await unreffedPause(POLL_MS)
  if (server.listening) closeBehindStandIn(server)
}

if ('bun' in process.versions) stopListening = closeOnBun

/** The stand-in goes when the server listens again. */
function closeBehindStandIn(server: net.Server): void {
  const { promise: closed, resolve: onClosed } = deferred<void>()
  const restoreEmit = replaceMethod(server, 'emit', (innerEmit) => {
    return function emit(this: net.Server, event: string, ...args: unknown[]): unknown {
      if (event !== 'close') return Reflect.apply(innerEmit, this, [event, ...args])
      onClosed()
      return true
    }
  })
  const isClosing = attempt(() => server.close(() => onClosed())) !== undefined
  if (!isClosing) onClosed()

  let isTold = false
  Reflect.defineProperty(server, 'listening', { configurable: true, value: true })
  const tell = (callback: (() => void) | undefined): void => {
    Reflect.deleteProperty(server, 'listening')
    callback?.()
    restoreEmit?.()
    if (!isTold) server.emit('close')
    isTold = true
  }
  const restoreClose = replaceMethod(server, 'close', () => {
    return function close(callback?: () => void): net.Server {
      void closed.then(() => setImmediate(tell, callback))
      return server
    }
  })
  server.once('listening', () => restoreClose?.())
}

// --- Copies that differ --------------------------------------------------------------------------

/** Where this copy is. Only a stack tells that in an ES module and in CommonJS alike. */
const FILE_IN_STACK = /(?:file:|\/|\w:\\)[^\n]*?(?=:\d+:\d+)/ // at <anonymous> (/srv/app.cjs:9:5)
const FILE: string = FILE_IN_STACK.exec(`${new Error().stack}`)?.[0] ?? ''

ownExports['FILE'] = FILE
if (firstExports) queueMicrotask(() => warnOfOtherVersion(firstExports)) // when all is loaded

/** Two versions may differ in more than their names. What the first one lacks is our own, and knows
 *  nothing of what is registered there. */
function warnOfOtherVersion(first: Record<string, unknown>): void {
  const isComplete = Object.keys(ownExports).every((name) => name in first)
  if (isComplete && first['VERSION'] === VERSION) return
  const loaded = `${String(first['FILE'])} (${String(first['VERSION'])})`
  log('warn', `is loaded twice: ${loaded} does the work of ${FILE} (${VERSION}), too`)
}

// --- Mistyped variables --------------------------------------------------------------------------

/** All that may begin with `FTW_MONITOR_`. Layers add to it. */
const VARIABLES = [
  'FTW_MONITOR_LISTEN',
  'FTW_MONITOR_URL',
  'FTW_MONITOR_AUTOWARMUP',
  'FTW_MONITOR_LOCAL',
  'FTW_MONITOR_TIMEOUT_MS',
  'FTW_MONITOR_MINIMUM_MS'
]

/** A mistyped one would have no effect, and nobody would notice. */
function warnOfUnknownVariables(): void {
  const names = attempt(() => Object.keys(process.env)) ?? [] // Deno may allow some of them alone
  const unknown = names.filter((name) => {
    if (!name.startsWith(PREFIX) || VARIABLES.includes(name)) return false
    const value = readEnv(name)
    return value !== undefined && !isOfKubernetes(name, value)
  })
  if (unknown.length > 0) log('warn', `does not know ${unknown.map(withNearest).join(', ')}`)
}

/** Kubernetes tells every container of a Service named ftw-monitor in such variables. */
function isOfKubernetes(name: string, value: string): boolean {
  return /_(SERVICE_(HOST|PORT)|PORT_\d+_)/.test(name) || /^(tcp|udp|sctp):/.test(value)
}

function withNearest(name: string): string {
  let nearest = { variable: '', likeness: 0 }
  for (const variable of VARIABLES) {
    const likeness = likenessOf(name.slice(PREFIX.length), variable.slice(PREFIX.length))
    if (likeness > nearest.likeness) nearest = { variable, likeness }
  }
  return nearest.likeness < LIKENESS_MIN ? name : `${name} (perhaps ${nearest.variable})`
}

const PREFIX = 'FTW_MONITOR_'
const LIKENESS_MIN = 0.4 // as of PATH and HEALTH_PATH

/** From 0 to 1, by the pairs of letters that two words share. */
function likenessOf(one: string, other: string): number {
  const pairs = Array.from(one.slice(1), (letter, at) => one.charAt(at) + letter)
  const common = pairs.filter((pair) => other.includes(pair))
  return (2 * common.length) / (one.length + other.length)
}

const SWITCHED_ON = /^(1|true|yes|on)$/i

/** `none` would not switch it off. */
function warnOfUnknownSwitch(): void {
  const name = 'FTW_MONITOR_AUTOWARMUP'
  const word = readEnv(name)
  if (word === undefined || SWITCHED_ON.test(word) || isSwitchedOff(name)) return
  log('warn', `cannot use ${name}=${word}: it is 0, false, no or off`)
}

extend(() => ({
  onBegin() {
    warnOfUnknownVariables()
    warnOfUnknownSwitch()
  }
}))

// --- Monitors that are switched off --------------------------------------------------------------

// FTW_MONITOR=0 leaves no trace but a line in the log, once: whoever wonders why nobody listens at
// the monitor's port is to find it. Where tests run it is expected, and a line each would be noise.

const TEST_RUNNER_VARIABLES = ['NODE_TEST_CONTEXT', 'JEST_WORKER_ID', 'VITEST']

let isSwitchTold = false

function tellIfSwitchedOff(): void {
  if (isSwitchTold || !isSwitchedOff('FTW_MONITOR')) return
  isSwitchTold = true
  const isTest = TEST_RUNNER_VARIABLES.some((name) => readEnv(name) !== undefined)
  if (!isTest) log('info', `is switched off by FTW_MONITOR=${readEnv('FTW_MONITOR')}`)
}

// Of all that happens in start(), this is what comes before it gives up.
extend(() => ({ findServers: tellIfSwitchedOff }))

// --- Programs that nobody edits ------------------------------------------------------------------

// With `FTW_MONITOR=auto` this file, preloaded into a program that knows nothing of it, does what
// start() does when the program's server listens, and delays its signals from then on; before that,
// and where none ever listens, as in npm and in child processes, it touches nothing but listen().

/** Threads inherit the environment, and load what was preloaded. */
const isWorkerThread = Reflect.get(methodOf(process, 'abort'), 'disabled') === true

const isAutoWanted = !firstExports && readAutoSwitch()

/** Whether this is a copy that begins by itself. */
const isAuto = isAutoWanted && !isWorkerThread

function readAutoSwitch(): boolean {
  const word = readEnv('FTW_MONITOR')
  if (word === undefined) return false
  const isAutomatic = /^auto$/i.test(word)
  // `on` may be meant as `auto`, and begins nothing.
  const isKnown = isAutomatic || isSwitchedOff('FTW_MONITOR')
  const values = 'auto, or 0, false, no or off'
  if (!isKnown && !isWorkerThread) log('warn', `cannot use FTW_MONITOR=${word}: it is ${values}`)
  return isAutomatic
}

/** A thread has no signals. */
function tellOfServerInThread(): void {
  const onListening = (server: net.Server): void => {
    if (!servesRequests(server) || !keepsProcessAlive(server)) return
    endSearch()
    const place = describeAddress(server.address() ?? '')
    const text = `does nothing for the server at ${place}, since it is in a worker thread`
    log('warn', `${text}: only the program itself can start() one there`)
  }
  const endSearch = observeListening({ onListen: doNothing, onListening })
}

const GUESS_MS = 1_000 // until a server that nobody named is taken for the instance

/** The monitor that nobody started: it begins when the program's server listens, and there may
 *  never be one. */
class AutoMonitor extends Monitor {
  get isSearching(): boolean {
    return this.state === 'new'
  }

  /** What it was begun with holds, unless something else is wanted in code. */
  override answerStart = ({ servers, ...others }: CheckedStartOptions): 'begin' | 'goOn' => {
    const isMoreWanted = Object.values(others).some((option) => option !== undefined)
    const isOurs = servers.every((server) => server === this.traffic.server)
    return this.isRunning && isOurs && !isMoreWanted ? 'goOn' : 'begin'
  }

  override onServerListening(server: net.Server): void {
    if (this.isSearching)
      queueMicrotask(() => this.#beginUnlessBegun()) // when all is loaded
    else super.onServerListening(server)
  }

  #beginUnlessBegun(): void {
    if (this.isSearching && monitor === this) void this.begin()
  }
}

function isSearching(owner: Monitor): boolean {
  return owner instanceof AutoMonitor && owner.isSearching
}

/** A server that waits for a single request, such as an OAuth callback, must not get ours for it.
 *  So one that nobody named has served a request before, or has listened for a second. */
async function untilInUse({ traffic, clock }: Monitor): Promise<void> {
  const limitTickMs = clock.nowTickMs + GUESS_MS
  while (traffic.requests === 0 && clock.nowTickMs < limitTickMs) {
    await new Promise<void>((resolve) => clock.schedule(TICK_MS, resolve))
  }
}

/** All that becomes of a signal: how the process ends is up to the program and to the signal
 *  itself, as without us. */
const DELAY: Ending = {
  isFinal: false,
  insist(first) {
    log('warn', 'got SIGINT again; lets the signals through')
    letThrough(first)
    process.kill(process.pid, 'SIGINT') // as the second one that it is
  },
  finish(first, _ended, leftMs) {
    letThrough(first)
    setTimeout(() => log('warn', `the program goes on after ${first.name}`), leftMs).unref()
  }
}

/** Lets the signal do what it would have done without us. */
function letThrough(signal: Signal): void {
  const hasOthers = signals.tellOthers(signal)
  if (hasOthers) return
  // The kernel spares the first process of a container, which would serve nobody for ever.
  if (process.pid === 1) process.exit(128 + (signal.number ?? 0))
  process.kill(process.pid, signal.name)
}

/** What a monitor does besides, in a program that was to be left as it is. */
class AutoExtension implements Extension {
  readonly #owner: Monitor

  constructor(owner: Monitor) {
    this.#owner = owner
  }

  onTick(): void {
    this.#delaySignals()
  }

  onListening(): void {
    this.#delaySignals()
  }

  async prepareWarmup(): Promise<void> {
    const { options } = this.#owner
    const isGuess = this.#owner instanceof AutoMonitor && !isPortKnown(options)
    if (isGuess) await untilInUse(this.#owner)
  }

  /** From when the instance listens, unless the program has asked for more. */
  #delaySignals(): void {
    const { traffic, isOff } = this.#owner
    if (isOff || signals.areHeard || signals.hasCome || !traffic.server?.listening) return
    signals.listen(ENDING_SIGNALS, { ...toShutdownOptions({}), ending: DELAY })
    monitor.findServers()
  }
}

if (isAuto) {
  extend((owner) => new AutoExtension(owner))
  monitor = new AutoMonitor({ servers: [] }, 'new')
  monitor.hookServers()
}

if (isAutoWanted && isWorkerThread) tellOfServerInThread()

// --- Layer: pages and balancers; all from here on may be deleted, and nothing above refers to it -

//   Pages
//   Our own requests
//   The view
//   The health path
//   The load of the event loop
//   What balancers ask
//   Waiting for health
//   PROXY headers
//   Idle connections
//
// What is set by the environment of a deployment rather than in code: pages in place of performers,
// what the service's own port answers, and what balancers want besides. It replaces, besides:
//
//   `keepAliveTimeout` and     from `start` on, where `keepAliveMs` says so; back at `stop` and at
//   `headersTimeout`           the end of a shutdown, unless the program has set them since

// --- Pages ---------------------------------------------------------------------------------------

// Pages of the instance itself that the environment names in place of code: to warm them, or to
// check them. Where nothing is registered, `/` is warmed.

const PAGE_WARNING_MS = 10_000 // by then a page is not slow, but silent

/** Registers each page that the environment names as a site, which is warmed by loading it. One
 *  that cannot be used is a site whose warm-up fails: another page's must not make it green. */
function registerPages(): void {
  const { pages, refused } = readPages('FTW_MONITOR_WARMUP')
  for (const page of pages) {
    const name = toSiteName(page)
    if (performers.has(name)) continue // what code says comes first
    // As it was written: some servers want the slash at its end.
    addSite(name, (warmup) => loadPage({ ...warmup, url: urlOfPage(page) }))
  }
  for (const word of refused) addSite(word, refusePage)
}

/** The default performer: loads the page that the first visitor would have waited for. It cannot
 *  warm what speaks no HTTP/1, such as gRPC; that is green as soon as it accepts. */
async function loadPage({ site, url, signal }: Warmup): Promise<void> {
  const { clock } = monitor
  const warn = (): void => {
    log('warn', `gets no answer from ${url}; if it never answers, register a warm-up performer`)
  }
  clock.schedule(PAGE_WARNING_MS, warn) // some servers answer nothing but upgrades
  try {
    const code = await visit(url, signal)
    if (code >= 500) throw new Error(`it answered ${code}`)
    if (code >= 300) log('warn', `got ${code} for ${site}: nothing behind it was loaded`)
  } catch (error) {
    if (!isOfOtherProtocol(error)) throw error
    log('warn', `cannot load ${site}: the instance speaks no HTTP/1; a performer of yours could`)
  } finally {
    clock.cancel(warn)
  }
}

defaultPerformers.set('/', loadPage)

/** Checks pages of the service's own that the environment names. */
function registerPageChecks(healthPath: string): void {
  const { pages, refused } = readPages('FTW_MONITOR_CHECK')
  for (const page of pages) {
    if (parseTarget(page).path === healthPath) {
      log('warn', `leaves ${page} out of FTW_MONITOR_CHECK: it would wait for itself`)
    } else if (!registeredChecks.has(page)) {
      registeredChecks.set(page, new PageCheck(page)) // what code says comes first
    }
  }
  // What was to be checked is not known to be well.
  for (const word of refused) {
    if (registeredChecks.has(word)) continue
    registeredChecks.set(word, new Dependency('Check', word, false, refusePage))
  }
}

async function checkPage(page: string): Promise<true> {
  const controller = new AbortController()
  try {
    const visited = visit(urlOfPage(page), controller.signal)
    const code = await withinLimit(visited, 2 * ANSWER_MS) // it is late before
    if (code >= 400) throw new Error(`it answered ${code}`)
    return true
  } finally {
    controller.abort()
  }
}

/** A check of a page of the instance itself, which has to accept connections first. */
class PageCheck extends Dependency {
  constructor(page: string) {
    super('Check', page, false, () => checkPage(page))
  }

  override get isPremature(): boolean {
    return super.isPremature || monitor.state !== 'accepting'
  }

  override get isCold(): boolean {
    return this.trouble(false) === 'timed out' && monitor.warmup.wasColdAt(this.call.askedAtMs)
  }
}

/** Pages that the environment names, with blanks or commas between them, and what is none there. */
function readPages(name: string): { pages: string[]; refused: string[] } {
  const words = pagesIn(readEnv(name))
  const refused = words.filter((word) => !isUsablePage(word)).map(clean)
  if (refused.length > 0)
    log('warn', `cannot use ${refused.join(' ')} of ${name}: ${PAGE_SENTENCE}`)
  return { pages: words.filter(isUsablePage).map(withoutFragment), refused }
}

function pagesIn(text = ''): string[] {
  return text.split(PAGE_SEPARATOR).filter(Boolean)
}

/** Other commas belong to the page: `/map?at=46.9,7.4`. */
const PAGE_SEPARATOR = /[,;]*\s+|[,;]+(?=\/|$)/
const PAGE_SENTENCE = 'a page is a path like /shop or /search?q=a'

function refusePage(): never {
  failWith(`cannot be used: ${PAGE_SENTENCE}`)
}

/** A browser would not send it either. */
function withoutFragment(page: string): string {
  return page.replace(/#.*/s, '')
}

extend((owner) => ({
  onBegin() {
    registerPages()
    registerPageChecks(healthPathOf(owner))
  }
}))

VARIABLES.push(
  'FTW_MONITOR_WARMUP',
  'FTW_MONITOR_CHECK',
  'FTW_MONITOR_HEALTH_PATH',
  'FTW_MONITOR_KEEP_ALIVE_MS'
)

// --- Our own requests ----------------------------------------------------------------------------

// The requests of a warm-up and of page checks. They go straight to the instance, whatever proxy
// this process is told to use, and bear the credentials of the URL.

/** Sends a GET of our own straight to the instance: for a page, or with a token for the view.
 *  Resolves to the status when all of the answer has come. Pages over http are not loaded by fetch,
 *  which knows no Unix sockets, refuses some ports, and gives up after 300 s. */
async function visit(url: string, signal: AbortSignal, token?: string): Promise<number> {
  const isPage = token === undefined
  const credentials = readCredentials(monitor.options)
  const headers = isPage ? credentials : { ...credentials, [TOKEN_HEADER]: token }
  const isHttps = /^https:/i.test(url)
  const doesFetchGoStraight = !mayFetchUseProxy()
  if (!isHttps && (isPage || !doesFetchGoStraight)) return visitByGet(url, headers, signal)
  if (!doesFetchGoStraight) failWith(`a proxy would be asked for it: name its host in NO_PROXY`)
  return visitByFetch(url, headers, signal)
}

/** Those of `http://user:password@host`, as a header. */
function readCredentials(options: CheckedStartOptions): Record<string, string> {
  const text = options.url ?? readEnv('FTW_MONITOR_URL')
  const url = attempt(() => new URL(text ?? ''))
  if (!url || (url.username === '' && url.password === '')) return {}
  const parts = [url.username, url.password]
  const decoded = parts.map((part) => attempt(() => decodeURIComponent(part)) ?? part)
  const encoded = Buffer.from(decoded.join(':')).toString('base64')
  return { authorization: `Basic ${encoded}` }
}

/** Where a page of the instance itself is loaded. */
function urlOfPage(page: string): string {
  const { instance } = monitor
  if (!instance) throw new Error('the instance is booting')
  return `${instance.url}${page}`
}

/** A proxy would see token and credentials, and may not reach us. Bun and Deno use one that the
 *  environment names, Node.js where it is told to, or where the program has put a dispatcher of its
 *  own in place. We cannot tell whether our host is one of those in `NO_PROXY`. */
function mayFetchUseProxy(): boolean {
  const names = Object.keys(process.env)
  const isHostExcepted = names.some((name) => NO_PROXY.test(name))
  if ('bun' in process.versions || 'deno' in process.versions) {
    return !isHostExcepted && names.some((name) => PROXY.test(name))
  }
  const harmless = isHostExcepted ? [...DIRECT_DISPATCHERS, PROXY_DISPATCHER] : DIRECT_DISPATCHERS
  return DISPATCHERS.some((key) => {
    const dispatcher: unknown = Reflect.get(globalThis, key)
    return dispatcher !== undefined && !harmless.includes(kindOfObject(dispatcher))
  })
}

const PROXY = /^(https?|all)_proxy$/i
const NO_PROXY = /^no_proxy$/i

/** Where fetch finds what sends its requests; it is there from the first request on. */
const DISPATCHERS = [
  Symbol.for('undici.globalDispatcher.1'),
  Symbol.for('undici.globalDispatcher.2')
]
const DIRECT_DISPATCHERS: unknown[] = ['Agent', 'Dispatcher1Wrapper']
const PROXY_DISPATCHER = 'EnvHttpProxyAgent' // which heeds NO_PROXY

function kindOfObject(value: unknown): unknown {
  return attempt(() => Object(value).constructor.name as unknown)
}

async function visitByFetch(
  url: string,
  headers: Record<string, string>,
  signal: AbortSignal
): Promise<number> {
  const page = await fetch(url, { headers, redirect: 'manual', signal })
  // A fetch that the program has put in its place may give a stream of Node.js.
  const parts = page.body as unknown as AsyncIterable<unknown> | null
  for await (const part of parts ?? []) void part
  return page.status
}

/** Without an agent, since the usual one may know of a proxy. */
function visitByGet(
  url: string,
  headers: Record<string, string>,
  signal: AbortSignal
): Promise<number> {
  const options = { agent: false, headers, signal, socketPath: monitor.instance?.location.path }
  return new Promise((resolve, reject) => {
    const request = http.get(url, options, (page) => {
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

const TOKEN_HEADER = 'x-ftw-monitor-token'

function adviceFor(message: unknown, code: string): string {
  if (message === 'bad port') return ' for fetch; register a warm-up performer that does without it'
  if (/_ALTNAME_/.test(code)) return '; set FTW_MONITOR_URL, or url, to a name that it has'
  if (NO_HTTP1.has(code)) return '; it speaks no HTTP/1'
  if (!/^(UNABLE_|SELF_|DEPTH_)/.test(code)) return ''
  return "; set NODE_EXTRA_CA_CERTS to its issuer's file"
}

advisers.push(adviceFor)

const NO_HTTP1 = new Set(['HPE_INVALID_CONSTANT', 'ERR_SSL_TLSV1_ALERT_NO_APPLICATION_PROTOCOL'])

/** Whether somebody answered, but not in HTTP/1. */
function isOfOtherProtocol(error: unknown): boolean {
  const { code, cause } = error as { code?: string; cause?: { code?: string } } // fetch has a cause
  return NO_HTTP1.has(code ?? cause?.code ?? '')
}

// --- The view ------------------------------------------------------------------------------------

/** Answers `GET /@@warmup` and `GET /SITE/@@warmup` of this machine when the warm-up is over: 200
 *  `Warmup successful` or 500 `Warmup failed: REASON`. It is there by itself where `start` has the
 *  server; else mount it: `app.use(warmupView)` in Express and Connect, `http.createServer((req,
 *  res) => warmupView(req, res, () => …))`. Other requests go to `next`, or are answered 404. */
export const warmupView: (
  request: http.IncomingMessage,
  response: http.ServerResponse,
  next?: () => void
) => void = shared('warmupView', (request, response, next) => {
  const { url = '', originalUrl = url } = request as { url?: string; originalUrl?: string }
  const site = warmupSite(originalUrl) // Express cuts url
  if (site === undefined) {
    if (next) next()
    else answerView(response, 404, 'Not found')
    return
  }

  const viewRequest = viewRequests.get(monitor)
  const isOurs = viewRequest?.isSentAs(request) === true
  const refusal = viewRefusal(request, isOurs)
  if (refusal) {
    answerView(response, ...refusal)
    return
  }
  const sites = sitesAt(isOurs ? '/' : site)
  if (sites.length === 0) {
    answerView(response, 404, 'No such site is registered')
    return
  }
  if (isOurs) {
    viewRequest.onSeen()
    response.shouldKeepAlive = false // else our own connection would delay server.close()
  }
  void answerWhenWarm(response, sites)
})

/** At the service's port we believe no browser, since it may be a visitor's behind a proxy that
 *  adds no header; nor HTTP/1.0, which nginx before 1.29.7 speaks in that case. */
function isLocalVisitor({ headers, httpVersion, socket }: http.IncomingMessage): boolean {
  if (httpVersion === '1.0' || fetchSiteOf(headers) !== undefined) return false
  if (TOKEN_HEADER in headers) return false // of another instance
  return isLocalSocket(socket) && isForOwnName(headers) && !isForwarded(headers)
}

/** What is to be warmed where a path is asked for: all sites for `/`, else the one of that name. */
function sitesAt(path: string): string[] {
  const all = [...siteNames()]
  return path === '/' ? all : all.filter((name) => name === path)
}

function viewRefusal(
  request: http.IncomingMessage,
  isOurs: boolean
): [status: number, text: string] | undefined {
  if (!isOurs && !isLocalVisitor(request)) return [403, 'Only this machine may ask for a warm-up']
  if (request.method !== 'GET') return [405, 'A warm-up is asked for by GET']
  if (!monitor.instance) return [503, 'The monitor is not started']
  return undefined
}

async function answerWhenWarm(response: http.ServerResponse, sites: string[]): Promise<void> {
  const failure = await monitor.warmup.warmUp(sites)
  try {
    if (failure) answerView(response, 500, toRedLine(`${WARMUP_FAILED}: ${failure}`))
    else answerView(response, 200, WARMED_UP)
  } catch {
    // The application may have answered meanwhile.
  }
}

function answerView(response: http.ServerResponse, code: number, text: string): void {
  response.writeHead(code, { 'Content-Type': PLAIN_TEXT })
  response.end(`${text}\n`)
}

/** Whether a request of the application's is answered by us. */
function isForView(target: string): boolean {
  return !monitor.isOff && warmupSite(target) !== undefined
}

/** The site of `/shop/@@warmup?now` is `/shop`, that of `/@@warmup` is `/`; undefined elsewhere. */
function warmupSite(target: string): string | undefined {
  const { path } = parseTarget(target)
  if (!path.endsWith(VIEW_PATH)) return undefined
  return path.slice(0, -VIEW_PATH.length) || '/'
}

const VIEW_PATH = '/@@warmup'

const WARMED_UP = 'Warmup successful'

addCommand(
  'warmup',
  `Warm up again: warmup [SITE]

    warmup does what GET /@@warmup does, warmup /shop what GET /shop/@@warmup does: the instance is
    out until it is over. Replies "Warmup successful", or why it failed; every 10 s, how far it is.
`,
  async (asker, path = '/') => {
    const sites = isUsablePage(path) ? sitesAt(toSiteName(path)) : []
    if (sites.length === 0) failWith(`Error: no site '${path}' is registered`)
    const report = (progress: string): void => asker.write(`${progress}\n`)
    const failure = await warmUpReporting(sites, report)
    if (failure) failWith(`${WARMUP_FAILED}: ${failure}`)
    return WARMED_UP
  },
  { http: false, local: true }
)

/** Reports now and then, since nobody waits for minutes without a word. */
async function warmUpReporting(
  sites: string[],
  report: (progress: string) => void
): Promise<string> {
  const done = monitor.warmup.warmUp(sites)
  for (;;) {
    const failure = await Promise.race([done, unreffedPause(REPORT_MS)])
    if (failure !== undefined) return failure
    const running = monitor.warmup.sites.find(({ state }) => state === 'running')
    if (!running) continue
    const time = `${running.seconds.toFixed(0)} s`
    report(toRedLine(`Has been warming up ${running.name} for ${time}`))
  }
}

/** A request of our own to the view, with which a warm-up begins: so performers run as the work of
 *  a request does. */
class ViewRequest implements Extension {
  readonly #owner: Monitor
  /** Which it bears. */
  #token: string | undefined
  #isSeen = false

  constructor(owner: Monitor) {
    this.#owner = owner
    viewRequests.set(owner, this)
  }

  isSentAs({ headers }: http.IncomingMessage): boolean {
    return this.#token !== undefined && headers[TOKEN_HEADER] === this.#token
  }

  onSeen(): void {
    this.#isSeen = true
    this.#owner.warmup.beginNow()
  }

  /** If nobody answers at the view, the performers run all the same. Only our token proves that it
   *  is there: a catch-all route, another worker or another process would answer, too. */
  async prepareWarmup(signal: AbortSignal): Promise<void> {
    const { instance } = this.#owner
    const isOnUnixSocket = instance?.location.path !== undefined // where nobody is asked for a view
    if (!instance || isOnUnixSocket) return
    // Not before, since it loads all of Node.js's cryptography; and some replace it.
    this.#token = attempt(() => crypto.randomUUID())
    this.#isSeen = false
    if (this.#token === undefined) return
    const { url } = instance
    await this.#sendTo(url, signal)
    const ipv6Url = ipv6UrlOf(this.#owner)
    if (this.#isSeen || ipv6Url === undefined) return
    instance.url = ipv6Url // for the performers, which begin as soon as it is seen
    await this.#sendTo(ipv6Url, signal)
    if (!this.#isSeen) instance.url = url
  }

  async #sendTo(url: string, signal: AbortSignal): Promise<void> {
    const { clock } = this.#owner
    const controller = new AbortController()
    const abort = (): void => controller.abort()
    const giveUp = (): void => {
      if (!this.#isSeen) abort()
    }
    if (signal.aborted) return
    signal.addEventListener('abort', abort)
    clock.schedule(VIEW_MS, giveUp)
    try {
      await visit(`${url}${VIEW_PATH}`, controller.signal, this.#token)
    } catch {
      // Nobody answered.
    } finally {
      clock.cancel(giveUp)
    }
  }
}

const VIEW_MS = 10_000 // until the view has seen our token: some routes never answer

const viewRequests = new WeakMap<Monitor, ViewRequest>()

/** IPv6 may be all that a server at `::` takes: then it is not at `localhost` where that is
 *  127.0.0.1, but another process may be. */
function ipv6UrlOf({ server, options, instance }: Monitor): string | undefined {
  const isTold = options.url !== undefined || readEnv('FTW_MONITOR_URL') !== undefined
  if (!server || isTold || boundAddress(options, server).address !== '::') return undefined
  return instance?.url.replace('//localhost', '//[::1]')
}

/** The view answers before the application would. Of HTTP/2, its request follows the stream. */
function answerAtView(event: string, args: unknown[]): 'taken' | 'uncounted' | undefined {
  if (event === 'stream') {
    const { ':path': path } = args[1] as http.IncomingHttpHeaders
    return isForView(String(path)) ? 'uncounted' : undefined
  }
  if (!REQUEST_EVENTS.has(event)) return undefined
  const request = args[0] as http.IncomingMessage | undefined
  const response = args[1] as http.ServerResponse
  const url: unknown = request?.url // of a mock, it may be anything
  const isMeant = typeof url === 'string' && isForView(url)
  if (!request || !isMeant || !isRequest(request, response)) return undefined
  warmupView(request, response)
  return 'taken'
}

const REQUEST_EVENTS = new Set(['request', 'checkContinue', 'checkExpectation'])

extend((owner) => new ViewRequest(owner))
extend(() => ({
  onEvent: (_traffic, _server, event, args) => answerAtView(event, args)
}))

// --- The health path -----------------------------------------------------------------------------

// A path at which the service's own port answers the verdict before the service sees the request,
// for platforms that give a container one port, and balancers with one health port for a pool.

export interface StartOptions {
  /** A path at which the service's own port answers the verdict, before the service sees the
   *  request: for platforms that give a container one port. Default: `FTW_MONITOR_HEALTH_PATH`. */
  healthPath?: string
}

optionChecks.set('healthPath', (path) => {
  must(path === undefined || isSitePath(path), 'healthPath must be a path, as /ready')
})

/** Sends an answer; it may find that its asker has gone. */
type SendHealth = (code: number, headers: http.OutgoingHttpHeaders, body: string) => void

/** Known also after the monitor has given up, when it must not be green, and where it is switched
 *  off, when it must not be red; '' where there is none. */
const healthPaths = new WeakMap<Monitor, string>()

function healthPathOf(owner: Monitor): string {
  const known = healthPaths.get(owner)
  if (known !== undefined) return known
  const { healthPath = healthPathInEnvironment() } = owner.options
  healthPaths.set(owner, healthPath)
  if (owner.options.healthPath === undefined) warnOfHealthPath(healthPath)
  return healthPath
}

/** Whatever the query, it is the same answer. A path without its slash, or a whole URL, is taken
 *  for the path that was meant: there, the service's own catch-all would always be green. */
function healthPathInEnvironment(): string {
  const [word = ''] = pagesIn(readEnv('FTW_MONITOR_HEALTH_PATH'))
  const { path } = parseTarget(withoutFragment(word))
  if (isUsablePage(path)) return path
  const meant = path.replace(/^[/\\]*/, '/')
  return isUsablePage(meant) && meant !== '/' ? meant : '' // never the home page by mistake
}

function warnOfHealthPath(path: string): void {
  const text = readEnv('FTW_MONITOR_HEALTH_PATH')
  if (text === undefined || (isUsablePage(text) && pagesIn(text).length === 1)) return
  const used = path === '' ? 'there is none' : `uses ${path}`
  log('warn', `cannot use FTW_MONITOR_HEALTH_PATH=${text}: it must be a path, as /ready; ${used}`)
}

/** The verdict is not that of bystanders. Other methods are the service's own. */
function isForHealth(traffic: Traffic, method: unknown, target: unknown): boolean {
  if (traffic !== monitor.traffic || monitor.state === 'new') return false
  if (method !== 'GET' && method !== 'HEAD') return false
  const path = healthPathOf(monitor)
  return path !== '' && parseTarget(String(target)).path === path
}

const USER_AGENT_MAX = 80 // characters, to tell probers apart

/** Tells what anybody may know. Visitors share their address with the balancer through which they
 *  come, so a prober is known by its User-Agent, too, and bears no forwarding header. */
async function answerHealth(
  headers: http.IncomingHttpHeaders,
  remoteAddress: string | undefined,
  send: SendHealth
): Promise<void> {
  const { probers, instance } = monitor
  const address = remoteAddress ?? instance?.location.path
  if (address !== undefined && !isForPerson(headers) && !isForwarded(headers)) {
    const agent = clean(headers['user-agent'] ?? 'no User-Agent').slice(0, USER_AGENT_MAX)
    const name = `${address.replace(MAPPED_ADDRESS, '')} (${agent})`
    probers.note({ isPerson: false, remoteAddress: name }, 1)
  }
  const { healthy, reason } = await inquireAndJudge()
  const body = `${reason}\n`
  attempt(() => send(healthy ? 200 : 503, headersFor(PLAIN_TEXT, body), body))
}

function answerHealthRequest(
  traffic: Traffic,
  request: http.IncomingMessage,
  response: http.ServerResponse
): void {
  const { headers, socket } = request
  traffic.keepBusy(socket, response)
  const send: SendHealth = (code, head, body) => response.writeHead(code, head).end(body)
  answerHealth(headers, socket.remoteAddress, send).catch(doNothing) // it may be no request
}

/** Of HTTP/2, for which `request` may not be emitted. */
function answerHealthStream(
  traffic: Traffic,
  session: Http2Session,
  stream: Http2Stream,
  headers: http.IncomingHttpHeaders
): void {
  traffic.keepBusy(session, stream)
  stream.on('error', doNothing) // its prober may have reset it
  const address = attempt(() => session.socket?.remoteAddress) // throws when it has ended
  const send: SendHealth = (code, head, body) => {
    stream.respond({ ':status': code, ...head })
    stream.end(headers[':method'] === 'HEAD' ? '' : body)
  }
  answerHealth(headers, address, send).catch(doNothing)
}

/** Returns whether the event is a request for the health path. */
function answerAtHealthPath(traffic: Traffic, event: string, args: unknown[]): boolean {
  if (event === 'stream') {
    const stream = args[0] as Http2Stream
    const headers = args[1] as http.IncomingHttpHeaders
    const isMeant = isForHealth(traffic, headers[':method'], headers[':path'])
    if (!isMeant || !stream.session) return false
    answerHealthStream(traffic, stream.session, stream, headers)
    return true
  }
  if (!REQUEST_EVENTS.has(event)) return false
  const request = args[0] as http.IncomingMessage | undefined
  const response = args[1] as http.ServerResponse
  if (!request || !isForHealth(traffic, request.method, request.url)) return false
  if (!isRequest(request, response)) return false
  answerHealthRequest(traffic, request, response)
  return true
}

extend(() => ({
  onEvent: (traffic, _server, event, args) => {
    return answerAtHealthPath(traffic, event, args) ? 'taken' : undefined
  }
}))

// A program that knows nothing of us has no health path, at which its platform asks all the same.
const isHealthPathOnly = !firstExports && !isWorkerThread && isSwitchedOff('FTW_MONITOR')
if (isHealthPathOnly && healthPathInEnvironment() !== '') {
  monitor = new Monitor({ servers: [] })
  monitor.hookServers()
}

// --- The load of the event loop ------------------------------------------------------------------

// How busy the event loop is, measured once a tick, so that probers get the same answer and none
// spoils another's.

/** Not every version of Node.js's types has it on `performance`. */
type MeasureUtilization = (now?: object, before?: object) => { active: number; utilization: number }

const LOAD_SAMPLES = 40 // of the event loop, one a tick: ten seconds

class Load {
  /** From 0 to 1, over the last ten seconds; -1 where the runtime cannot tell. */
  utilization = -1
  #samples: object[] = []

  measure(): void {
    const { eventLoopUtilization }: { eventLoopUtilization?: MeasureUtilization } =
      Object(performance)
    const now = eventLoopUtilization?.()
    if (!now?.active) return // it is missing on Bun, and always 0 on Deno
    this.#samples = [...this.#samples.slice(-LOAD_SAMPLES), now]
    this.utilization = eventLoopUtilization?.(now, this.#samples[0]).utilization || 0
  }
}

const loadByMonitor = new WeakMap<Monitor, Load>()

function loadOf(owner: Monitor): Load {
  const load = loadByMonitor.get(owner) ?? new Load()
  loadByMonitor.set(owner, load)
  return load
}

extend((owner) => ({
  onTick() {
    loadOf(owner).measure()
  },
  onClose() {
    loadByMonitor.delete(owner) // nothing is measured until the clock begins again
  }
}))

// --- What balancers ask --------------------------------------------------------------------------

const AGENT_WORTH = 3 // answers of health_check: one takes a server out (of an address that several
// backends share, `fall` says how many answers they need together)

addCommand('agent_check', "Answer HAProxy's agent check", async (asker) => {
  monitor.probers.note(asker, AGENT_WORTH)
  const verdict = await inquireAndJudge()
  if (verdict.healthy) return `up ${idlePercentage()}%`
  const state = monitor.draining ? 'stopped' : 'down'
  return asker.reply(`${state} #${reasonFor(asker, verdict)}\n`, 503, PLAIN_TEXT)
})

/** What the event loop has left over, but never nothing: an instance that fails fast is idle
 *  too. */
function idlePercentage(): number {
  const idle = Math.round(100 - 100 * Math.max(0, loadOf(monitor).utilization))
  return Math.max(10, idle)
}

/** A prober may ask too rarely for a shutdown to tell it: the log says so while there is time to
 *  change that. */
function tellIfTooSlow(prober: Prober): void {
  const { options } = signals
  if (!options) return
  const { fall } = options
  const tellingMs = tellingLimitMs(options.timeoutMs)
  const neededMs = Math.ceil(fall / prober.answersPerAsk) * prober.intervalMs
  if (neededMs <= tellingMs) return
  const needed = `${fall} answers take ${Math.round(neededMs / 1_000)} s`
  const limit = `a shutdown waits ${tellingMs / 1_000} s for its probers`
  const advice = 'raise timeoutMs, unless it asks faster then'
  log('info', `${prober.shownAddress} ${prober.pace}: ${needed}, but ${limit}; ${advice}`)
}

extend(() => ({ onProber: tellIfTooSlow }))

// --- Waiting for health --------------------------------------------------------------------------

const HEALTHY_POLL_MS = 250 // of untilHealthy: databases bear that for a whole boot

/** Resolves at the first `OK`, for PM2's `process.send('ready')` and for tests; at once where there
 *  is no monitor: with `FTW_MONITOR=0`, after `stop()`, and where `start` gave up. Called before
 *  `start` it waits, for ever if `start` is never called, but keeps no process alive. Rejects with
 *  the reason of `signal` when that aborts, with a `TypeError` for wrong options, and with an
 *  `Error` once a shutdown is over: not before, since a rejection that nobody catches would end the
 *  process in the middle of it. */
export const untilHealthy: (options?: { signal?: AbortSignal }) => Promise<void> = shared(
  'untilHealthy',
  async (options = {}) => {
    mustHaveOnly(options, ['signal'], 'untilHealthy takes')
    const { signal = new AbortController().signal } = options
    const isSignal = hasMethods(signal, 'addEventListener', 'throwIfAborted')
    must(isSignal, 'signal must be an AbortSignal')
    signal.throwIfAborted()
    await untilAbort(signal, pollUntilHealthy(signal))
    signal.throwIfAborted()
  }
)

async function pollUntilHealthy(signal: AbortSignal): Promise<void> {
  while (!signal.aborted) {
    if (currentShutdown) {
      await currentShutdown.done.promise
      throw new Error('ftw-monitor: the instance has shut down')
    }
    const isOver = monitor.isOff && monitor.state !== 'new'
    if (isOver || isSwitchedOff('FTW_MONITOR')) return
    const isHealthy = monitor.isRunning && (await inquireAndJudge()).healthy
    if (isHealthy) return
    await unreffedPause(HEALTHY_POLL_MS)
  }
}

// --- PROXY headers -------------------------------------------------------------------------------

// A balancer that speaks the PROXY protocol says who its client is before it sends anything else:
// in a line, or in bytes behind a signature. That is skipped and not believed, since anybody can
// send it.

const PROXY_LINE_MAX = 107 // bytes, as the PROXY protocol says of its version 1
const PROXY_HEADER_MAX = 4_096 // bytes of version 2: addresses, and a few extensions of balancers

/** How many bytes of a connection's beginning are such a header; 0 where there is none. */
function proxyHeaderLength(bytes: Buffer): number | 'incomplete' | 'wrong' {
  if (mayBeginWith(PROXY_LINE_START, bytes)) return proxyLineLength(bytes)
  if (mayBeginWith(PROXY_SIGNATURE, bytes)) return proxyBytesLength(bytes)
  return 0
}

/** Whether the bytes that have come are those of a signature, or the first of them. */
function mayBeginWith(signature: Buffer, bytes: Buffer): boolean {
  if (bytes[0] !== signature[0]) return false // most checks: nothing more is looked at
  const length = Math.min(signature.length, bytes.length)
  return bytes.compare(signature, 0, length, 0, length) === 0
}

/** Of version 1. */
function proxyLineLength(bytes: Buffer): number | 'incomplete' | 'wrong' {
  const text = bytes.toString('latin1', 0, PROXY_LINE_MAX)
  if (text.includes('\n')) return PROXY_LINE.exec(text)?.[0].length ?? 'wrong'
  return text.length < PROXY_LINE_MAX ? 'incomplete' : 'wrong'
}

/** Of version 2: behind the signature come version and command, the family of the addresses, and
 *  the length of what follows. */
function proxyBytesLength(bytes: Buffer): number | 'incomplete' | 'wrong' {
  if (bytes.length < PROXY_FIXED_BYTES) return 'incomplete'
  const isKnown = PROXY_COMMANDS.includes(bytes.readUInt8(12))
  const length = PROXY_FIXED_BYTES + bytes.readUInt16BE(14)
  if (!isKnown || length > PROXY_HEADER_MAX) return 'wrong'
  return bytes.length < length ? 'incomplete' : length
}

const PROXY_WORD = 'PROXY '
const PROXY_LINE_START = Buffer.from(PROXY_WORD)
/** PROXY TCP4 192.0.2.7 10.0.0.5 51234 8160, or PROXY UNKNOWN and perhaps more */
const PROXY_LINE = /^PROXY (?:TCP[46](?: [\da-fA-F.:]+){2}(?: \d+){2}|UNKNOWN(?: .*)?)\r\n/

/** As the protocol writes it: blank lines, a zero and QUIT, which no other protocol begins with */
const PROXY_SIGNATURE = Buffer.from([
  0x0d, 0x0a, 0x0d, 0x0a, 0x00, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a
])
const PROXY_FIXED_BYTES = 16
const PROXY_COMMANDS = [0x20, 0x21] // LOCAL, which HAProxy's own checks send, and PROXY

const WRONG_PROXY_HEADER = 'Error: wrong PROXY header\n'

/** A header that breaks off is taken for a line. */
skipPreamble = (lines) => {
  const length = proxyHeaderLength(lines.unread)
  if (length === 'incomplete') return lines.socket.readableEnded
  if (length === 'wrong') {
    lines.refuse(WRONG_PROXY_HEADER)
  } else if (length > 0) {
    lines.isProxied = true
    lines.unread = lines.unread.subarray(length)
  }
  return true
}

// --- Idle connections ----------------------------------------------------------------------------

// A balancer may keep connections for longer than Node.js does, and then send a request to one that
// is just being closed.

export interface StartOptions {
  /** For how long the server keeps a connection open on which no request comes, in milliseconds:
   *  longer than the balancer does, or a request may meet a connection that is just being closed.
   *  Default: `FTW_MONITOR_KEEP_ALIVE_MS`, else what the server says itself. */
  keepAliveMs?: number
}

optionChecks.set('keepAliveMs', (ms = 0) => {
  must(typeof ms === 'number', 'keepAliveMs must be a number')
  const isInRange = ms >= 0 && ms <= MILLISECONDS_MAX
  must(isInRange, `keepAliveMs must be a number from 0 to ${MILLISECONDS_MAX}`, RangeError)
})

const HEAD_MS = 1_000 // for a head, beyond the time for which a connection is kept without one

/** Makes a server keep idle connections for so long; returns a function that undoes this. */
function keepConnections(server: http.Server, keepAliveMs: number | undefined): () => void {
  const { keepAliveTimeout, headersTimeout } = server
  if (keepAliveMs === undefined || keepAliveTimeout === undefined) return doNothing
  const headMs = headersTimeout && Math.max(headersTimeout, keepAliveMs + HEAD_MS) // 0: no limit
  server.keepAliveTimeout = keepAliveMs
  server.headersTimeout = headMs
  return () => {
    if (server.keepAliveTimeout === keepAliveMs) server.keepAliveTimeout = keepAliveTimeout
    if (server.headersTimeout === headMs) server.headersTimeout = headersTimeout
  }
}

/** Tells the servers of a monitor, but no bystanders. */
class IdleLimit implements Extension {
  readonly #owner: Monitor
  readonly #restores: (() => void)[] = []

  constructor(owner: Monitor) {
    this.#owner = owner
  }

  onServer(traffic: Traffic, server: net.Server): void {
    if (traffic !== this.#owner.traffic) return
    const { keepAliveMs = readMilliseconds('FTW_MONITOR_KEEP_ALIVE_MS') } = this.#owner.options
    this.#restores.push(keepConnections(server as http.Server, keepAliveMs))
  }

  onUnhook(): void {
    for (const restore of this.#restores.splice(0)) restore()
  }
}

extend((owner) => new IdleLimit(owner))

// --- Layer: figures and metrics; all from here on may be deleted, and nothing above refers to it -

//   Figures
//   Metrics

// --- Figures -------------------------------------------------------------------------------------

// Numbers under the names and in the formats that ftw.monitor gave them.

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

export interface Database {
  /** Lists the open connections, for the command `monitor`. */
  connections?(): OpenConnection[] | Promise<OpenConnection[]>
  /** Returns figures, for `dbinfo`, `zeocache` and `perf_metrics`. */
  figures?(): Figures | Promise<Figures>
}

databaseMethods.push('connections', 'figures')

/** What a database tells of itself; these calls resolve to undefined if it has no such method. */
interface DatabaseCalls {
  connections: SharedCall
  figures: SharedCall
}

const databaseCalls = new WeakMap<RegisteredDatabase, DatabaseCalls>()

function callsOf(registered: RegisteredDatabase): DatabaseCalls {
  const { database } = registered
  const calls = databaseCalls.get(registered) ?? {
    connections: new SharedCall(() => database.connections?.(), ANSWER_MS),
    figures: new SharedCall(() => database.figures?.(), ANSWER_MS)
  }
  databaseCalls.set(registered, calls)
  return calls
}

const JSON_TEXT = 'application/json'

/** Returns the database that is meant; `-` and nothing mean `main`, else the first one. */
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

const HISTORY_SECONDS = 3_600 // as far as zc.z3monitor looks back

/** Counts events, and remembers an hour of them by the second. */
class Counter {
  total = 0
  /** The oldest second comes first. */
  readonly bySecond = new Map<number, number>()

  /** Takes `unknown`, since JavaScript may pass '3', which would be concatenated. */
  add(count: unknown = 1): void {
    const events = Number(count)
    must(events >= 0 && events < Infinity, 'a count must be a number from 0', RangeError)
    const second = Math.floor(performance.now() / 1_000)
    this.total += events
    this.bySecond.set(second, (this.bySecond.get(second) ?? 0) + events)
    if (this.bySecond.size <= HISTORY_SECONDS) return
    const [oldest = second] = this.bySecond.keys()
    this.bySecond.delete(oldest)
  }
}

const counters = new WeakMap<RegisteredDatabase, Record<keyof Activity, Counter>>()

function countersOf(registered: RegisteredDatabase): Record<keyof Activity, Counter> {
  const known = counters.get(registered)
  if (known) return known
  const made = { loads: new Counter(), stores: new Counter(), connections: new Counter() }
  counters.set(registered, made)
  return made
}

activityOf = (registered) => {
  const { loads, stores, connections } = countersOf(registered)
  return {
    loads: (count) => loads.add(count),
    stores: (count) => stores.add(count),
    connections: (count) => connections.add(count)
  }
}

/** Returns what was counted in the last seconds. */
function countsOf(registered: RegisteredDatabase, seconds: number): Record<keyof Activity, number> {
  const { loads, stores, connections } = countersOf(registered)
  return {
    loads: countedIn(loads, seconds),
    stores: countedIn(stores, seconds),
    connections: countedIn(connections, seconds)
  }
}

function countedIn({ bySecond }: Counter, seconds: number): number {
  const now = Math.floor(performance.now() / 1_000)
  let sum = 0
  for (const [second, count] of bySecond) {
    if (now - second < seconds) sum += count
  }
  return sum
}

/** Returns a database's own figures, -1 for each that it leaves out. */
async function figuresOf(
  registered: RegisteredDatabase | undefined
): Promise<(name: keyof Figures) => number> {
  const figures: unknown = await (registered && callsOf(registered).figures.ask())
  return (name) => {
    const value = isObject(figures) ? figures[name] : undefined
    return typeof value === 'number' && Number.isFinite(value) ? Math.trunc(value) : -1
  }
}

addCommand(
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

addCommand(
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

addCommand('zeostatus', 'Get ZEO client status information', async (_, name) => {
  const registered = databaseNamed(name)
  await registered.ask()
  return registered.isPassing ? 'True' : 'False'
})

addCommand(
  'monitor',
  `Get general process info

    monitor [AGE=100] [DATABASE]: how many requests are in flight, or connections of a database are
    open; the memory; and, on this machine, those that are older than AGE seconds (0: all).
`,
  async (asker, age = '100', name) => {
    const least = toNumber(age, 'AGE', Number.MAX_SAFE_INTEGER)
    const open = name === undefined ? listRequests() : await openConnections(databaseNamed(name))
    const kilobytes = Math.round(readResidentMemory() / 1_024)
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

/** The requests in flight. */
function listRequests(): Open[] | undefined {
  const { server, openRequests } = monitor.traffic
  if (!server) return undefined
  return Array.from(openRequests, ({ startedAtMs, line }) => ({
    seconds: (performance.now() - startedAtMs) / 1_000,
    info: withoutQuery(line)
  }))
}

/** Query strings carry secrets. */
function withoutQuery(line: string): string {
  return line.replace(/\?.*/s, '')
}

async function openConnections(registered: RegisteredDatabase): Promise<Open[] | undefined> {
  const open = await callsOf(registered).connections.ask()
  if (!Array.isArray(open)) return undefined
  return open.map((connection: unknown) => {
    const { openedAt, info } = Object(connection) as OpenConnection
    const seconds = (Date.now() - Number(openedAt)) / 1_000 || 0
    // The wall clock may have been set back.
    return { seconds: Math.max(0, seconds), info: errorText(info) }
  })
}

/** Without a server given, nothing is known of requests. */
function httpFigures(): { in_flight: number; requests: number; errors: number } {
  const { server, requestsInFlight, requests, errors } = monitor.traffic
  if (!server) return { in_flight: -1, requests: -1, errors: -1 }
  return { in_flight: requestsInFlight, requests, errors }
}

addCommand(
  'perf_metrics',
  `Get performance related metrics

    perf_metrics [DATABASE] [SECONDS=300]: one line of JSON, with -1 for what cannot be had.
`,
  async (asker, name = '-', seconds = '300') => {
    const registered = databases.size > 0 || name !== '-' ? databaseNamed(name) : undefined
    const span = toNumber(seconds, 'SECONDS', HISTORY_SECONDS)
    await registered?.ask()
    if (registered?.isPassing === false) {
      return JSON.stringify({ error: toRedLine(registered.sentence(asker.local)) })
    }

    return JSON.stringify({
      instance: {
        uptime: Math.floor(process.uptime()),
        pid: process.pid
      },
      ...(await databaseFigures(registered, span)),
      memory: memoryFigures(),
      cpu: process.cpuUsage(),
      loop: { utilization: Number(loadOf(monitor).utilization.toFixed(4)) },
      http: httpFigures()
    })
  },
  { type: JSON_TEXT }
)

/** Under the names that they have in ftw.monitor. */
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

/** -1 where no descriptor is left to read it by. */
function readResidentMemory(): number {
  return attempt(() => process.memoryUsage.rss()) ?? -1
}

function memoryUsage(): NodeJS.MemoryUsage {
  const unknown = { rss: -1, heapUsed: -1, heapTotal: -1, external: -1, arrayBuffers: -1 }
  return attempt(() => process.memoryUsage()) ?? unknown
}

/** In bytes. What is -1 cannot be read with the modules that this file restricts itself to. */
function memoryFigures(): object {
  const { rss, heapUsed, heapTotal, external, arrayBuffers } = memoryUsage()
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

// The load of the instance, second by second

/** A second of the instance's life; a blocked event loop makes it longer. */
interface Second {
  endedAtMs: number
  seconds: number
  utilization: number
  /** The largest delay of a timer. */
  lagMs: number
  requests: number
  /** Answers of 500 and more. */
  errors: number
  answers: number
  /** How long they took together. */
  answersMs: number
}

/** What has been counted since the monitor was made. */
type Totals = Pick<Second, 'requests' | 'errors' | 'answers' | 'answersMs'>

/** How the instance did in the last LATELY_SECONDS. */
interface Lately {
  lagSeconds: number
  errors: number
  answers: number
  /** -1 where nothing was answered. */
  meanAnswerMs: number
}

const TICKS_PER_SECOND = 1_000 / TICK_MS
const CHART_SECONDS = 120 // two minutes on the page
const LATELY_SECONDS = 30 // longer than a scrape's interval, so that no delay falls between two

class LoadHistory {
  /** The last two minutes, the oldest first. */
  seconds: Second[] = []
  #tickedAtMs = performance.now()
  #ticks = 0
  #secondBeganAtMs = performance.now()
  /** When the last second began. */
  #before: Totals
  #lagMs = 0
  readonly #blocks = new BlockWatch()

  constructor(owner: Monitor) {
    this.#before = totalsOf(owner.traffic)
  }

  onTick(owner: Monitor): void {
    const nowMs = performance.now()
    const lateMs = Math.max(0, nowMs - this.#tickedAtMs - TICK_MS)
    this.#tickedAtMs = nowMs
    this.#lagMs = Math.max(this.#lagMs, this.#blocks.onTick(owner, lateMs))
    this.#ticks++
    if (this.#ticks % TICKS_PER_SECOND === 0) this.#endSecond(owner, nowMs)
  }

  #endSecond(owner: Monitor, nowMs: number): void {
    const { traffic } = owner
    const totals = totalsOf(traffic)
    const second: Second = {
      endedAtMs: nowMs,
      seconds: Math.max(1, (nowMs - this.#secondBeganAtMs) / 1_000),
      utilization: loadOf(owner).utilization,
      lagMs: this.#lagMs,
      requests: totals.requests - this.#before.requests,
      errors: totals.errors - this.#before.errors,
      answers: totals.answers - this.#before.answers,
      answersMs: totals.answersMs - this.#before.answersMs
    }
    this.seconds = [...this.seconds.slice(1 - CHART_SECONDS), second]
    this.#secondBeganAtMs = nowMs
    this.#before = totals
    this.#lagMs = 0
  }

  get lately(): Lately {
    const sinceMs = performance.now() - LATELY_SECONDS * 1_000
    let lagMs = this.#lagMs
    let errors = 0
    let answers = 0
    let answersMs = 0
    for (const second of this.seconds) {
      if (second.endedAtMs <= sinceMs) continue
      lagMs = Math.max(lagMs, second.lagMs)
      errors += second.errors
      answers += second.answers
      answersMs += second.answersMs
    }
    const meanAnswerMs = answers > 0 ? answersMs / answers : -1
    return { lagSeconds: lagMs / 1_000, errors, answers, meanAnswerMs }
  }
}

/** The history of each load. It begins with the clock of the monitor, and goes with the load. */
const loadHistories = new WeakMap<Load, LoadHistory>()

extend((owner) => ({
  onTick() {
    const load = loadOf(owner)
    const history = loadHistories.get(load)
    if (history) history.onTick(owner)
    else loadHistories.set(load, new LoadHistory(owner))
  }
}))

/** Nothing has happened before the clock has begun. */
function latelyOf(owner: Monitor): Lately {
  const nothing = { lagSeconds: 0, errors: 0, answers: 0, meanAnswerMs: -1 }
  return loadHistories.get(loadOf(owner))?.lately ?? nothing
}

// Answers

/** A request that took a while, and is over. */
interface EndedRequest {
  startedAtMs: number
  endedAtMs: number
  line: string
}

const ENDED_MAX = 100 // between two ticks, or where nothing ticks any more

class Answers {
  count = 0
  totalMs = 0
  /** Since they were last taken. */
  #ended: EndedRequest[] = []

  add({ startedAtMs, line }: RequestInFlight, isAnswered: boolean): void {
    const endedAtMs = performance.now()
    const tookMs = endedAtMs - startedAtMs
    if (isAnswered) {
      this.count++
      this.totalMs += tookMs
    }
    const isWorthNaming = tookMs >= IN_FLIGHT_MS && this.#ended.length < ENDED_MAX
    if (isWorthNaming) this.#ended.push({ startedAtMs, endedAtMs, line })
  }

  takeEnded(): EndedRequest[] {
    return this.#ended.splice(0)
  }
}

const answersByTraffic = new WeakMap<Traffic, Answers>()

function answersOf(traffic: Traffic): Answers {
  const known = answersByTraffic.get(traffic)
  if (known) return known
  const answers = new Answers()
  answersByTraffic.set(traffic, answers)
  return answers
}

extend(() => ({
  onRequestEnd(traffic, request, statusCode) {
    answersOf(traffic).add(request, statusCode > 0)
  }
}))

function totalsOf(traffic: Traffic): Totals {
  const { count, totalMs } = answersOf(traffic)
  const { requests, errors } = traffic
  return { requests, errors, answers: count, answersMs: totalMs }
}

// Blocks of the event loop

const BLOCK_MS = 1_000 // probers and people wait that long; shorter ones would fill the log
const BLOCK_LOG_MS = 10_000 // between lines, or a loop that is always blocked fills the log
const CPU_SHARE = 1 / 4 // of a block: whoever uses less was not computing
const IN_FLIGHT_MS = 100 // of a block; what comes after it is there in the same turn, but briefly

/** A block that has no line in the log yet. */
interface HeldBlock {
  endedAtMs: number
  ms: number
  text: string
}

/** Sees how late each tick is, and says in the log what was in flight during a long block. */
class BlockWatch {
  #activeMs = readActiveMs()
  #cpuMs = readCpuMs()
  #loggedAtMs = -Infinity
  /** How long the block was that was logged last. */
  #loggedMs = 0
  /** The longest one since then. */
  #held: HeldBlock | undefined
  /** How many there were besides it. */
  #shorterCount = 0

  /** Returns the largest delay that a timer may have had: our own may have become due late in a
   *  block. */
  onTick(owner: Monitor, lateMs: number): number {
    const ended = answersOf(owner.traffic).takeEnded()
    const activeMs = readActiveMs()
    const cpuMs = readCpuMs()
    const wasActiveMs = activeMs - this.#activeMs
    const wasOnCpuMs = cpuMs - this.#cpuMs
    this.#activeMs = activeMs
    this.#cpuMs = cpuMs
    this.#logHeld()
    if (lateMs <= BLOCK_MS - TICK_MS) return lateMs

    const wasBusyMs = wasActiveMs || wasOnCpuMs // as far as the runtime can tell
    const blockMs = Math.min(lateMs + TICK_MS, Math.max(lateMs, wasBusyMs))
    const isComputing = wasOnCpuMs >= blockMs * CPU_SHARE
    const isBoot = owner.state !== 'accepting' // when modules are loaded
    if (blockMs > BLOCK_MS && !isBoot) this.#tell(owner, blockMs, isComputing, ended)
    return blockMs
  }

  /** A process that is suspended, as by SIGSTOP or with a laptop, finds its timers late, too. */
  #tell({ traffic }: Monitor, blockMs: number, isComputing: boolean, ended: EndedRequest[]): void {
    const seconds = (blockMs / 1_000).toFixed(1)
    const what = isComputing
      ? `was blocked for ${seconds} s`
      : `stood still for ${seconds} s, and hardly used the CPU: the process was suspended or ` +
        'starved, or made a synchronous call'
    const inFlight = traffic.server ? `; ${describeInFlight(traffic, ended, blockMs)}` : ''
    const text = `that the event loop ${what}${inFlight}`

    // A longer one must not hide behind the one before it: it may have another cause.
    if (this.#isLineDue || blockMs > this.#loggedMs) this.#log(blockMs, text)
    else this.#hold({ endedAtMs: performance.now(), ms: blockMs, text })
  }

  get #isLineDue(): boolean {
    return performance.now() - this.#loggedAtMs >= BLOCK_LOG_MS
  }

  #log(blockMs: number, text: string): void {
    this.#loggedAtMs = performance.now()
    this.#loggedMs = blockMs
    log('warn', `noticed ${text}`)
  }

  #hold(block: HeldBlock): void {
    if (this.#held) this.#shorterCount++
    if (!this.#held || block.ms > this.#held.ms) this.#held = block
  }

  #logHeld(): void {
    if (!this.#held || !this.#isLineDue) return
    const { endedAtMs, ms, text } = this.#held
    const seconds = ((performance.now() - endedAtMs) / 1_000).toFixed(0)
    const count = this.#shorterCount
    const others = count > 0 ? `; besides, ${plural(count, 'shorter block', 'shorter blocks')}` : ''
    this.#held = undefined
    this.#shorterCount = 0
    this.#log(ms, `${seconds} s ago ${text}${others}`)
  }
}

/** For how long the event loop did not wait for anything; 0 where the runtime cannot tell. */
function readActiveMs(): number {
  const { eventLoopUtilization }: { eventLoopUtilization?: MeasureUtilization } =
    Object(performance)
  return eventLoopUtilization?.().active ?? 0
}

function readCpuMs(): number {
  const { user, system } = process.cpuUsage()
  return (user + system) / 1_000
}

/** `in flight: GET /burn, 2 others`. Of those that were there for half of the block, the newest
 *  comes first, since a block often begins with the request that is the reason for it. */
function describeInFlight(traffic: Traffic, ended: EndedRequest[], blockMs: number): string {
  const nowMs = performance.now()
  const open = Array.from(traffic.openRequests, (each) => ({ ...each, endedAtMs: nowMs }))
  const inFlight = [...open, ...ended]
    .map(({ line, startedAtMs, endedAtMs }) => {
      const insideMs = endedAtMs - Math.max(startedAtMs, nowMs - blockMs)
      return { line, startedAtMs, insideMs, weight: Math.min(insideMs, blockMs / 2) }
    })
    .filter(({ insideMs }) => insideMs >= IN_FLIGHT_MS)
    .sort((one, other) => other.weight - one.weight || other.startedAtMs - one.startedAtMs)
  if (inFlight.length === 0) return 'no request was being served, those that came meanwhile waited'

  return `in flight: ${nameRequests(inFlight)}`
}

// Requests in the log

const NAMES_MAX = 3 // of requests in one line
const NAME_MAX = 80 // characters
const WAIT_TOLD_MS = 3_000 // after the server has closed: most requests are over by then

/** `GET /burn, GET /slow, 2 others` */
function nameRequests(requests: { line: string }[]): string {
  const all = requests.map(({ line }) => clean(withoutQuery(line)).slice(0, NAME_MAX))
  const names = [...new Set(all)].slice(0, NAMES_MAX)
  const others = requests.length - names.length
  if (others > 0) names.push(plural(others, 'other', 'others'))
  return names.join(', ')
}

/** Says once what a shutdown has been waiting for for a while. */
class CloseWatch implements Extension {
  readonly #owner: Monitor
  #closingSinceMs: number | undefined
  #isTold = false

  constructor(owner: Monitor) {
    this.#owner = owner
  }

  onTick(): void {
    if (this.#isTold || currentShutdown?.state !== 'closing') return
    const nowMs = performance.now()
    this.#closingSinceMs ??= nowMs
    if (nowMs - this.#closingSinceMs < WAIT_TOLD_MS) return
    const open = this.#owner.allTraffic.flatMap((each) => [...each.openRequests])
    if (open.length === 0) return
    this.#isTold = true
    log('info', `waits for ${plural(open.length, 'request', 'requests')}${describeRequests(open)}`)
  }
}

extend((owner) => new CloseWatch(owner))

describeRequests = (requests) => (requests.length > 0 ? `: ${nameRequests(requests)}` : '')

// --- Metrics -------------------------------------------------------------------------------------

// What Prometheus collects: our families, and those of the service.

const PROMETHEUS_TEXT = 'text/plain; version=0.0.4; charset=utf-8'
const COLLECTOR_MS = 5_000 // half of Prometheus's own limit

/** Metrics of one name, in the text format of Prometheus. */
interface Family {
  name: string
  help: string
  /** By their labels, as `{database="main"}`; '' for none. What is less than 0 is not known. */
  values: Map<string, number>
}

addCommand(
  'metrics',
  'Get metrics for Prometheus, in its text exposition format',
  async () => {
    const collected = await collectAll()
    await inquire() // last, so that nothing is registered between it and the verdict
    const families = [
      ...processFamilies(),
      ...instanceFamilies(),
      ...databaseFamilies(),
      checkFamily()
    ]
    const ours = families.filter(({ name }) => !isCollected(name, collected))
    return [...ours.flatMap(linesOfFamily), ...[...collected.values()].flat()].join('\n')
  },
  { type: PROMETHEUS_TEXT }
)

/** OpenMetrics names a counter's family without the `_total` of its samples. */
function isCollected(name: string, collected: Map<string, string[]>): boolean {
  return collected.has(name) || collected.has(name.replace(/_total$/, ''))
}

const collectors: Collector[] = []

/** A function of the service that returns metrics in Prometheus's text format. */
interface Collector {
  call: SharedCall
  /** A failure is logged once, until it works again. */
  isFailing: boolean
}

/** Adds what the service has to say to `metrics`: `registerMetrics(() =>
 *  client.register.metrics())` of prom-client, say. `collect` returns Prometheus's text format, or
 *  a promise of it, within 5 s. A family in it replaces ours of that name. What fails
 *  costs its own part, and one line in the log. Throws a `TypeError` for what is no function. */
export const registerMetrics: (collect: () => string | Promise<string>) => void = shared(
  'registerMetrics',
  (collect) => {
    must(typeof collect === 'function', 'registerMetrics takes a function that gives text')
    collectors.push({ call: new SharedCall(collect, COLLECTOR_MS), isFailing: false })
  }
)

/** Returns the lines of each family; if two collectors have the same one, the first counts. */
async function collectAll(): Promise<Map<string, string[]>> {
  const parts = await Promise.all(collectors.map(collectFrom))
  const all = new Map<string, string[]>()
  for (const [name, lines] of parts.flatMap((families) => [...families])) {
    if (!all.has(name)) all.set(name, lines)
  }
  return all
}

async function collectFrom(collector: Collector): Promise<Map<string, string[]>> {
  const families = new Map<string, string[]>()
  let trouble = ''
  try {
    const text = await collector.call.ask()
    if (typeof text !== 'string') failWith('what registerMetrics was given gave no text')
    const wrongLine = sortByFamily(text, families)
    if (wrongLine) trouble = `no line of Prometheus's text format: ${wrongLine.slice(0, 100)}`
  } catch (error) {
    trouble = errorText(error)
  }
  if (trouble !== '' && !collector.isFailing) log('warn', `leaves metrics out: ${trouble}`)
  collector.isFailing = trouble !== ''
  return families
}

/** Puts each line into its family; returns the first wrong one. That is left out, since with it
 *  Prometheus would take no metrics at all. */
function sortByFamily(text: string, families: Map<string, string[]>): string {
  const isOpenMetrics = OPEN_METRICS_END.test(text)
  let current = ''
  let wrongLine = ''
  for (const given of text.split(/\r?\n/)) {
    if (METRICS_COMMENT.test(given)) continue
    const line = DESCRIPTION.test(given) ? given : toSample(given, isOpenMetrics)
    if (line === '') {
      wrongLine ||= given
      continue
    }
    current = familyOf(line, current)
    const lines = families.get(current) ?? []
    lines.push(line)
    families.set(current, lines)
  }
  return wrongLine
}

/** A sample belongs to the family before it if its name begins with that one's, as a histogram's
 *  does, else to one of its own. */
function familyOf(line: string, before: string): string {
  const [, hash, name = ''] = METRIC_NAME.exec(line) ?? []
  const isInside = hash === undefined && before !== '' && `${name}_`.startsWith(`${before}_`)
  return isInside ? before : name
}

const OPEN_METRICS_END = /^# EOF\s*$/m

/** A blank line, or a comment; also what OpenMetrics adds, `# EOF` and `# UNIT size bytes`. */
const METRICS_COMMENT = /^\s*(?:$|#(?! (?:HELP|TYPE)\b))/

/** `# HELP size How big.`, `# TYPE size gauge` */
const DESCRIPTION =
  /^# (?:HELP [a-z_:]|TYPE [a-z_:][\w:]* (?:counter|gauge|histogram|summary|untyped)\s*$)/i

/** `# TYPE size`, or `size` */
const METRIC_NAME = /^(# \w+ )?([\w:]+)/

/** `{path="/", code="200"}` */
const LABELS = /\{\s*(?:[a-z_]\w*\s*=\s*"(?:\\.|[^"\\])*"\s*(?:,\s*|(?=\})))*\}/.source

/** `7`, `-1.5e-3`, `+Inf` */
const VALUE = /[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|inf|nan)/.source

/** `1700000000000`, and what OpenMetrics may add: `# {trace_id="abc"} 1` */
const TIME_AND_EXEMPLAR = /(?:\s+(-?\d+(?:\.\d+)?))?\s*(?:# \{.*)?/.source

/** `size{unit="B"} 7 1700000000000` */
const SAMPLE = new RegExp(
  `^([a-z_:][\\w:]*(?:\\s*${LABELS}\\s*|\\s+)${VALUE})${TIME_AND_EXEMPLAR}$`,
  'i'
)

/** Returns a sample as Prometheus's text format has it, '' for what is none. There times are in
 *  milliseconds, in OpenMetrics in seconds. */
function toSample(line: string, isOpenMetrics: boolean): string {
  const [, sample = '', time] = SAMPLE.exec(line) ?? []
  if (time === undefined) return sample
  const isInSeconds = isOpenMetrics || time.includes('.')
  return `${sample} ${isInSeconds ? Math.round(Number(time) * 1_000) : time}`
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
  const { rss, heapUsed, heapTotal, external } = memoryUsage()
  const { utilization } = loadOf(monitor)
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
    family('nodejs_version_info', 'Version of Node.js.', 1, version),
    family('ftw_monitor_build_info', 'Version of ftw-monitor.', 1, `{version="${VERSION}"}`)
  ]
}

const LAG_HELP = 'The largest delay of a timer in the last thirty seconds.'

function instanceFamilies(): Family[] {
  const { traffic, warmup } = monitor
  const { healthy, state } = judgeAndTell()
  const isWarm = Number(warmup.state === 'done')
  const { requests, in_flight, errors } = httpFigures()
  const upgraded = traffic.server ? traffic.upgradedConnections : -1
  const { lagSeconds } = latelyOf(monitor)
  return [
    family('ftw_monitor_healthy', 'Whether it may be sent requests.', Number(healthy)),
    stateFamily(state),
    family('ftw_monitor_warmup_done', 'Whether it is warm.', isWarm),
    siteFamily(warmup),
    family('ftw_monitor_http_requests_total', 'Requests so far.', requests),
    family('ftw_monitor_http_requests_in_flight', 'Requests in flight.', in_flight),
    family('ftw_monitor_http_errors_total', 'Answers of 500 and more.', errors),
    family('ftw_monitor_upgraded_connections', 'Connections of WebSockets, say.', upgraded),
    family('ftw_monitor_eventloop_lag_seconds', LAG_HELP, lagSeconds)
  ]
}

/** A series for each state, of which one is 1: what OpenMetrics calls a state set. */
function stateFamily(current: VerdictState): Family {
  const values = VERDICT_STATES.map((state): [string, number] => [
    `{state="${state}"}`,
    Number(state === current)
  ])
  return { name: 'ftw_monitor_state', help: 'The verdict.', values: new Map(values) }
}

const SITE_HELP = 'How long its warm-up took, or has run so far.'

function siteFamily({ sites }: WarmupRunner): Family {
  const byName = new Map(sites.map((site) => [site.name, site]))
  const values = valuesByLabel('site', byName, ({ state, seconds }) => {
    return state === 'off' || state === 'waiting' ? -1 : seconds
  })
  return { name: 'ftw_monitor_warmup_seconds', help: SITE_HELP, values }
}

function databaseFamilies(): Family[] {
  const ofEach = (
    name: string,
    help: string,
    value: (of: RegisteredDatabase) => number
  ): Family => ({
    name: `ftw_monitor_database_${name}`,
    help,
    values: valuesByLabel('database', databases, value)
  })
  const passing = valuesByLabel('database', databases, passingValue, optionalLabel)
  const counted = (kind: keyof Activity): Family =>
    ofEach(
      `${kind}_total`,
      `What the service counted as ${kind}.`,
      (of) => countersOf(of)[kind].total
    )

  return [
    { name: 'ftw_monitor_database_connected', help: 'Whether it is connected.', values: passing },
    ofEach('answer_seconds', 'How long its last answer took.', ({ call }) => {
      return call.answeredMs / 1_000
    }),
    counted('loads'),
    counted('stores'),
    counted('connections')
  ]
}

function checkFamily(): Family {
  const values = valuesByLabel('check', registeredChecks, passingValue, optionalLabel)
  return { name: 'ftw_monitor_check_passing', help: 'Whether it passes.', values }
}

function passingValue({ isAsked, isPassing }: Dependency): number {
  return isAsked ? Number(isPassing) : -1
}

/** What the instance needs has no such label, which is the same as an empty one. */
function optionalLabel({ isOptional }: Dependency): string {
  return isOptional ? ',optional="true"' : ''
}

function valuesByLabel<T>(
  label: string,
  all: Map<string, T>,
  value: (of: T) => number,
  moreLabels: (of: T) => string = () => ''
): Map<string, number> {
  const values = new Map<string, number>()
  for (const [name, each] of all) {
    const labels = `{${label}=${JSON.stringify(clean(name))}${moreLabels(each)}}`
    values.set(labels, value(each))
  }
  return values
}

// --- Layer: status and page; all from here on may be deleted, and nothing above refers to it -----

//   Changes of the verdict
//   Status
//   The page

// --- Changes of the verdict ----------------------------------------------------------------------

// When the instance was red, and why: a line in the log for each change, and the last few of them
// for the status. What the monitor does itself is recorded when it happens. Databases and checks
// are asked when somebody asks, and once at the end of a boot, a warm-up and a drain; between them
// they are left alone, so that one which sleeps is not kept awake.

const CHANGES_MAX = 10 // of the verdict, that the status shows
const CHANGE_LINE_MS = 1_000 // between lines in the log that tell of a change

/** The history of each monitor. */
const histories = new WeakMap<Monitor, VerdictHistory>()

class VerdictHistory implements Extension {
  /** The last ones, the oldest first, each with the time since which it held. */
  readonly changes: { verdict: Verdict; time: string }[] = []
  readonly #owner: Monitor
  #redSinceMs = performance.now()
  #hasBeenHealthy = false
  #dueLine: { level: 'info' | 'warn'; text: string } | undefined
  #loggedAtTickMs = -Infinity

  constructor(owner: Monitor) {
    this.#owner = owner
    this.#add(BOOTING)
    histories.set(owner, this)
  }

  /** Compares what anybody may know: details may differ each time. */
  onVerdict(verdict: Verdict): void {
    const before = this.changes.at(-1)?.verdict ?? BOOTING
    if (before.reason === verdict.reason) return
    this.#add(verdict)
    if (verdict.healthy) this.#tellHealthy(before)
    else this.#tellRed(verdict, before)
  }

  /** The clock would not tell of it any more. */
  onClose(): void {
    if (!this.#owner.isOff) this.#logDueLine()
  }

  #tellRed({ grade, cause }: Verdict, before: Verdict): void {
    if (before.healthy) this.#redSinceMs = performance.now()
    const isBoot = !this.#hasBeenHealthy && grade === 'warn' // which tells of itself
    if (!isBoot) this.#logSoon(grade === 'fail' ? 'warn' : 'info', `is red: ${cause}`)
  }

  #tellHealthy(before: Verdict): void {
    const seconds = ((performance.now() - this.#redSinceMs) / 1_000).toFixed(1)
    const again = this.#hasBeenHealthy ? ' again' : ''
    const isRedUntold = this.#dueLine !== undefined
    const why = isRedUntold ? `; it was red: ${before.cause}` : ''
    this.#logSoon('info', `is healthy${again} after ${seconds} s${why}`)
    this.#hasBeenHealthy = true
  }

  #add(verdict: Verdict): void {
    if (this.changes.length === CHANGES_MAX) this.changes.shift()
    this.changes.push({ verdict, time: new Date().toISOString() })
  }

  /** Of several changes within a second, only the last one is logged. */
  #logSoon(level: 'info' | 'warn', text: string): void {
    this.#dueLine = { level, text }
    const { clock } = this.#owner
    const waitMs = this.#loggedAtTickMs + CHANGE_LINE_MS - clock.nowTickMs
    if (waitMs > 0) clock.schedule(waitMs, this.#logDueLine)
    else this.#logDueLine()
  }

  readonly #logDueLine = (): void => {
    if (!this.#dueLine) return
    log(this.#dueLine.level, this.#dueLine.text)
    this.#dueLine = undefined
    this.#loggedAtTickMs = this.#owner.clock.nowTickMs
  }
}

extend((owner) => new VerdictHistory(owner))

// --- Status --------------------------------------------------------------------------------------

// How the instance is, at one look: as an object, as text for people, as JSON for programs.

/** How the instance is, as `status()` returns it. What cannot be known is -1. */
export interface Status {
  /** Whether it may be sent requests. */
  healthy: boolean
  /** The same, or why not, in a word. */
  state: VerdictState
  /** `warn` where it is not healthy, but for a reason that will pass by itself: it boots, warms up,
   *  drains, or shuts down. */
  grade: 'pass' | 'warn' | 'fail'
  /** `OK`, or why not. */
  reason: string
  /** The last ten changes of the verdict, the oldest first; the last one is what holds now. One of
   *  a database or a check is seen when somebody asks. */
  changes: VerdictChange[]
  /** Where the instance is reached; '' before that is known. */
  url: string
  /** Whether the instance accepts connections. */
  listening: boolean
  /** How long the process has run. */
  uptimeSeconds: number
  requestsInFlight: number
  /** Connections of WebSockets, say. */
  upgradedConnections: number
  /** The busy part of the last ten seconds, from 0 to 1. */
  eventLoopUtilization: number
  /** The longest delay of a timer in the last 30 s. */
  eventLoopLagSeconds: number
  /** How many requests were answered in the last 30 s. */
  answers: number
  /** How many of them with 500 or more. */
  errors: number
  /** How long they took on average, from the head of the request to the last byte. */
  meanAnswerMs: number
  residentMemoryBytes: number
  warmup: SiteStatus[]
  databases: DatabaseStatus[]
  checks: CheckStatus[]
  probers: ProberStatus[]
  /** `undefined` where it does not drain. */
  draining: DrainingStatus | undefined
}

/** A verdict, and since when it held. */
export interface VerdictChange {
  /** In ISO 8601, such as `2026-11-28T09:30:00.000Z`. */
  time: string
  healthy: boolean
  state: VerdictState
  grade: 'pass' | 'warn' | 'fail'
  reason: string
}

/** How the warm-up of a site stands. */
export interface SiteStatus {
  site: string
  status: 'off' | 'waiting' | 'running' | 'warm' | 'failed'
  /** How long it took, or has run so far. */
  seconds: number
  /** Why it failed, '' if it did not. */
  failure: string
  /** How long until it is tried again, -1 where it did not fail. */
  nextTrySeconds: number
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
  /** For how long an answer has been awaited, -1 if none is. */
  pendingSeconds: number
}

/** How a check is. */
export interface CheckStatus {
  name: string
  optional: boolean
  passing: boolean
  /** What is wrong, '' if nothing: `failed`, `timed out`, or `failed: REASON`. */
  trouble: string
  /** How long the last answer took. */
  answeredMs: number
  /** For how long an answer has been awaited, -1 if none is. */
  pendingSeconds: number
}

/** An address that asks for the verdict. */
export interface ProberStatus {
  /** With its `User-Agent` where it asks at the health path. */
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
  /** Whether each of them knows, `minimumMs` is over, and no request is in flight. */
  finished: boolean
  /** Whether the instance shuts down then. */
  shutdown: boolean
}

/** Tells how the instance is, at one look. Answers within a second, and never rejects. */
export const status: () => Promise<Status> = shared('status', async () => {
  return statusFor(true)
})

/** What tells of others, the addresses of probers and the texts of errors, is for this machine
 *  only. */
async function statusFor(isLocal: boolean): Promise<Status> {
  await inquire()
  const { healthy, state, grade, reason, explanation } = judgeAndTell()
  const { clock, instance, warmup, probers, draining } = monitor
  const changes = histories.get(monitor)?.changes ?? []
  return {
    healthy,
    state,
    grade,
    reason: isLocal ? explanation : reason,
    changes: changes.map(({ verdict, time }) => ({
      time,
      healthy: verdict.healthy,
      state: verdict.state,
      grade: verdict.grade,
      reason: isLocal ? verdict.explanation : verdict.reason
    })),
    url: instance?.url ?? '',
    listening: monitor.state === 'accepting' && !monitor.isInstanceClosing,
    uptimeSeconds: process.uptime(),
    ...trafficStatus(monitor),
    eventLoopUtilization: loadOf(monitor).utilization,
    eventLoopLagSeconds: latelyOf(monitor).lagSeconds,
    residentMemoryBytes: readResidentMemory(),
    warmup: warmup.sites.map((site) => siteStatus(site, isLocal)),
    databases: answered(databases).map((each) => {
      return { ...dependencyStatus(each, isLocal), connected: each.isPassing }
    }),
    checks: answered(registeredChecks).map((each) => {
      return { ...dependencyStatus(each, isLocal), passing: each.isPassing }
    }),
    probers: proberStatuses(probers, clock, isLocal),
    draining: draining && drainingStatus(draining)
  }
}

type TrafficStatus = Pick<
  Status,
  'requestsInFlight' | 'upgradedConnections' | 'answers' | 'errors' | 'meanAnswerMs'
>

function trafficStatus(owner: Monitor): TrafficStatus {
  const { server, requestsInFlight, upgradedConnections } = owner.traffic
  if (!server) {
    const unknown = { requestsInFlight: -1, upgradedConnections: -1 }
    return { ...unknown, answers: -1, errors: -1, meanAnswerMs: -1 }
  }
  const { answers, errors, meanAnswerMs } = latelyOf(owner)
  return { requestsInFlight, upgradedConnections, answers, errors, meanAnswerMs }
}

/** Those of which something is known. */
function answered(dependencies: Map<string, Dependency>): Dependency[] {
  return [...dependencies.values()].filter(({ isAsked }) => isAsked)
}

/** The latest first, and none that has been silent for an hour. */
function proberStatuses(probers: Probers, clock: Clock, isLocal: boolean): ProberStatus[] {
  const all = Array.from(probers.known, ({ shownAddress, lastAskedAtTickMs, intervalMs }) => ({
    address: isLocal ? shownAddress : 'a prober',
    askedSecondsAgo: (clock.nowTickMs - lastAskedAtTickMs) / 1_000,
    intervalSeconds: intervalMs < 0 ? -1 : intervalMs / 1_000
  }))
  const recent = all.filter(({ askedSecondsAgo }) => askedSecondsAgo <= HISTORY_SECONDS)
  return recent.sort((one, other) => one.askedSecondsAgo - other.askedSecondsAgo)
}

function siteStatus({ name, state, seconds, failure }: Site, isLocal: boolean): SiteStatus {
  return {
    site: name,
    status: state,
    seconds,
    failure: isLocal ? failure : '',
    nextTrySeconds: state === 'failed' ? secondsToNextTry(monitor) : -1
  }
}

/** How long until what has failed to warm up is tried again, -1 where nothing has. */
function secondsToNextTry({ warmup, clock }: Monitor): number {
  const { retryAtTickMs } = warmup
  return retryAtTickMs === undefined ? -1 : (retryAtTickMs - clock.nowTickMs) / 1_000
}

function drainingStatus(draining: Draining): DrainingStatus {
  const { sinceMs, informedCount, missingCount, isTold } = draining
  return {
    seconds: (performance.now() - sinceMs) / 1_000,
    probers: informedCount + missingCount,
    probersInformed: informedCount,
    finished: isTold && monitor.traffic.requestsInFlight === 0,
    shutdown: currentShutdown !== undefined
  }
}

/** What a database and a check have in common. */
function dependencyStatus(dependency: Dependency, isLocal: boolean): Omit<CheckStatus, 'passing'> {
  const { name, isOptional, call } = dependency
  const { answeredMs, pendingSinceMs } = call
  const isPending = pendingSinceMs !== undefined
  return {
    name,
    optional: isOptional,
    trouble: dependency.trouble(isLocal),
    answeredMs,
    pendingSeconds: isPending ? (performance.now() - pendingSinceMs) / 1_000 : -1
  }
}

addCommand(
  'status',
  `Show how the instance is

    status: the verdict, and what it comes from. Over HTTP it is JSON, in the shape of
    traffic/health+json.
`,
  async (asker) => {
    const known = await statusFor(asker.local)
    if (asker.isHttp) asker.reply(renderJson(known), known.healthy ? 200 : 503, HEALTH_JSON)
    else asker.write(renderText(known))
  }
)

/** Not even the name of a site may make HAProxy's `expect string OK` green. */
function withoutOkUnlessHealthy(text: string, { healthy }: Status): string {
  return healthy ? text : text.replaceAll('OK', 'O K')
}

/** One thing that the status tells of: a line for people, a check of the JSON, a row of the
 *  page. */
interface Row {
  kind:
    'instance' | 'last 30 s' | 'warm-up' | 'database' | 'check' | 'prober' | 'draining' | 'since'
  name: string
  text: string
  grade: Grade
  /** What is measured, in the words of the JSON, with its unit. */
  measure: string
  value: number
  unit: string
  /** Of a warm-up. */
  stage?: SiteStatus['status']
  /** Of what runs, from 0 to 1, which is done; -1 where no end is in sight. */
  progress?: number
}

function rowsOf(known: Status): Row[] {
  return [
    instanceRow(known),
    latelyRow(known),
    ...known.warmup.map(siteRow),
    ...known.databases.map(databaseRow),
    ...known.checks.map(checkRow),
    ...known.probers.map(proberRow),
    drainingRow(known),
    ...known.changes.map(changeRow).reverse()
  ]
}

function instanceRow(known: Status): Row {
  const { url, uptimeSeconds, requestsInFlight, upgradedConnections } = known
  const { eventLoopUtilization, residentMemoryBytes } = known
  const place = known.listening ? url : `${url} (not listening)`
  const parts = [url === '' ? 'not found yet' : place, `up ${duration(uptimeSeconds)}`]
  if (requestsInFlight >= 0) {
    parts.push(plural(requestsInFlight, 'request in flight', 'requests in flight'))
    parts.push(`${upgradedConnections} upgraded`)
  }
  if (eventLoopUtilization >= 0) parts.push(`loop ${percentage(eventLoopUtilization)} % busy`)
  parts.push(`${Math.round(residentMemoryBytes / 2 ** 20)} MiB`)
  return { ...measured('uptime', uptimeSeconds, 's'), text: parts.join(', ') }
}

/** Amber after a long block, since a prober that waits for a second was not answered then. */
function latelyRow({ eventLoopLagSeconds, answers, errors, meanAnswerMs }: Status): Row {
  const row = measured('eventLoop:lag', eventLoopLagSeconds, 's')
  const grade = eventLoopLagSeconds * 1_000 > BLOCK_MS ? 'warn' : 'pass'
  const parts = [`longest lag ${shortTime(eventLoopLagSeconds * 1_000)}`]
  if (answers >= 0) parts.push(plural(answers, 'answer', 'answers'))
  if (answers > 0) parts.push(`${shortTime(meanAnswerMs)} on average`, `${errors} with 5xx`)
  return { ...row, kind: 'last 30 s', grade, text: parts.join(', ') }
}

/** `12 ms`, `1.2 s` */
function shortTime(ms: number): string {
  return ms < 1_000 ? `${Math.round(ms)} ms` : `${(ms / 1_000).toFixed(1)} s`
}

function measured(measure: string, value: number, unit: string): Row {
  return { kind: 'instance', name: '', text: '', grade: 'pass', measure, value, unit }
}

function siteRow({ site, status: stage, seconds, failure, nextTrySeconds }: SiteStatus): Row {
  const time = `${seconds.toFixed(1)} s`
  const measure = { measure: 'warmup:duration', value: seconds, unit: 's' }
  const row = {
    kind: 'warm-up',
    name: site,
    ...measure,
    stage,
    grade: STAGE_GRADES[stage]
  } as const
  switch (stage) {
    case 'warm':
      return { ...row, text: `warm after ${time}`, progress: 1 }
    case 'running':
      return { ...row, text: `running for ${time}`, progress: -1 }
    case 'failed': {
      const why = failure === '' ? '' : `: ${failure}`
      const next = nextTrySeconds < 0 ? '' : `; next try in ${Math.ceil(nextTrySeconds)} s`
      return { ...row, text: `failed after ${time}${next}${why}` }
    }
    case 'waiting':
    case 'off':
      return { ...row, text: stage }
  }
}

const STAGE_GRADES = {
  off: 'pass',
  waiting: 'warn',
  running: 'warn',
  warm: 'pass',
  failed: 'fail'
} as const

function databaseRow(database: DatabaseStatus): Row {
  const measure = 'database:responseTime'
  return dependencyRow('database', database, database.connected ? 'connected' : '', measure)
}

function checkRow(check: CheckStatus): Row {
  return dependencyRow('check', check, check.passing ? 'passes' : '', 'check:responseTime')
}

/** `passing` tells in a word that it does, '' if it does not. */
function dependencyRow(
  kind: 'database' | 'check',
  { name, optional, trouble, answeredMs, pendingSeconds }: Omit<CheckStatus, 'passing'>,
  passing: string,
  measure: string
): Row {
  // Whether it is slow, or one call hangs, decides what is to be looked at.
  const isHanging = trouble === 'timed out' && pendingSeconds >= 0
  const why = isHanging ? `no answer for ${pendingSeconds.toFixed(0)} s` : trouble
  const stateText = passing ? `${passing}, answered in ${Math.round(answeredMs)} ms` : why
  const text = optional ? `${stateText} (optional)` : stateText
  const broken: Grade = optional ? 'warn' : 'fail'
  const grade = passing ? 'pass' : broken
  return { kind, name, text, grade, measure, value: answeredMs, unit: 'ms' }
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

  const { seconds, probers, probersInformed, finished } = draining
  const requests = plural(requestsInFlight, 'request in flight', 'requests in flight')
  const inFlight = requestsInFlight >= 0 ? `, ${requests}` : ''
  const known = `${probersInformed} of ${probers} probers know`
  const text = `${finished ? 'finished, ' : ''}for ${seconds.toFixed(1)} s, ${known}${inFlight}`
  return { ...row, text, grade: 'warn', value: seconds, progress: drainingProgress(draining) }
}

function drainingProgress({ probers, probersInformed, finished }: DrainingStatus): number {
  if (finished) return 1
  // Once each of them knows, it goes on for as long as requests do.
  return probersInformed < probers ? probersInformed / probers : -1
}

/** The latest one tells since when the verdict holds. */
function changeRow(change: VerdictChange): Row {
  const { time, healthy } = change
  const seconds = (Date.now() - Date.parse(time)) / 1_000
  const text = `${toSecond(time)}  ${healthy ? 'healthy' : `red: ${describeState(change)}`}`
  return { ...measured('verdict:age', seconds, 's'), kind: 'since', text }
}

/** A drain's own words may be anybody's: `Draining: until noon`. */
function describeState({ state, reason }: Pick<Status, 'state' | 'reason'>): string {
  return state === 'draining' && reason !== 'Draining' ? `Draining: ${reason}` : reason
}

/** `2026-11-28 09:30:00Z` of `2026-11-28T09:30:00.000Z`. */
function toSecond(time: string): string {
  return `${time.slice(0, 19).replace('T', ' ')}Z`
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

const STATUS_KIND_WIDTH = 11 // `last 30 s`, the longest, and two blanks

const HEALTH_JSON = 'application/health+json'

/** In the shape of the draft "Health Check Response Format for HTTP APIs". */
function renderJson(known: Status): string {
  const rows = rowsOf(known)
  const isComplete = rows.every(({ grade }) => grade === 'pass')
  const whole = {
    status: jsonStatusOf(known.healthy, isComplete),
    ...(!known.healthy && { output: known.reason }),
    description: known.url,
    checks: checksOf([
      ...rows,
      measured('requests:inFlight', known.requestsInFlight, 'requests'),
      measured('connections:upgraded', known.upgradedConnections, 'connections'),
      measured('eventLoop:utilization', known.eventLoopUtilization, 'ratio'),
      measured('answers:count', known.answers, 'answers'),
      measured('answers:errors', known.errors, 'answers'),
      measured('answers:meanTime', known.meanAnswerMs, 'ms'),
      measured('memory:resident', known.residentMemoryBytes, 'B')
    ])
  }
  return withoutOkUnlessHealthy(`${JSON.stringify(whole, null, 2)}\n`, known)
}

/** What is to get no requests is `fail` here, also where that will pass by itself. */
function jsonStatusOf(isHealthy: boolean, isComplete: boolean): Grade {
  if (!isHealthy) return 'fail'
  return isComplete ? 'pass' : 'warn'
}

function checksOf(rows: Row[]): Record<string, object[]> {
  const time = new Date().toISOString()
  const checks: Record<string, object[]> = {}
  for (const { kind, name, text, grade, measure, value, unit, stage } of rows) {
    const check = {
      ...(name !== '' && { componentId: clean(name) }),
      componentType: kind === 'database' ? 'datastore' : 'component',
      status: grade,
      ...(stage && { stage }),
      observedValue: value,
      observedUnit: unit,
      time,
      ...(text !== '' && { output: clean(text) })
    }
    checks[measure] = [...(checks[measure] ?? []), check]
  }
  return checks
}

// --- The page ------------------------------------------------------------------------------------

// The status for a browser: what `/` is to whoever accepts HTML.

const PAGE = '/'

/** Help for all others. */
nameOfRoot = ({ accept }) => (accept?.includes('text/html') ? PAGE : 'help')

addCommand(
  PAGE,
  'Show how the instance is to a browser',
  (asker) => (asker instanceof Exchange ? showPage(asker) : refuseUnknown(PAGE, asker)),
  { hidden: true }
)

async function showPage(exchange: Exchange): Promise<void> {
  const nonce = crypto.randomUUID()
  const known = await statusFor(exchange.local)
  const page = withoutOkUnlessHealthy(renderPage(known, exchange, nonce), known)
  const policy =
    `default-src 'none'; style-src 'nonce-${nonce}'; base-uri 'none'; form-action 'none'; ` +
    `frame-ancestors 'none'`
  exchange.reply(page, 200, 'text/html; charset=utf-8', { 'Content-Security-Policy': policy })
}

const PAGE_STYLE = `:root { color-scheme: light dark; font: 1rem/1.5 system-ui, sans-serif }
body { margin: 1rem auto; max-width: 54rem; padding: 0 1rem } h1, p, td { overflow-wrap: anywhere }
h1 { border-radius: .3rem; color: #fff; font-size: clamp(1.2rem, 6vw, 2rem); padding: .5rem 1rem }
h1.pass { background: #17692d } h1.fail { background: #a8201a }
h1.warn { background: #ffb81c; color: #000 }
tr.fail { color: light-dark(#a8201a, #ff9a92) } tr.warn { color: light-dark(#855000, #ffb454) }
th, td { padding: .1rem .8rem .1rem 0; text-align: start; vertical-align: top }
th { white-space: nowrap } td + td { width: 65% } progress { accent-color: #c77700; width: 6rem }
@media (max-width: 30rem) { td { display: block } td + td { width: auto } }
figure { margin: 1rem 0 } table { width: 100% } polyline { vector-effect: non-scaling-stroke }
figure div { display: flex; justify-content: space-between; margin: .3rem 0 }
svg { border: solid; border-width: 1px 0; display: block; height: 6rem; width: 100% }
svg.axis { border: 0; height: .5rem } polyline { fill: none; stroke-width: 2 }
rect.pass { fill: #17692d } rect.warn { fill: #ffb81c } rect.fail { fill: #a8201a }
.load { border-bottom: 3px solid #c77700; stroke: #c77700 }
.requests { border-bottom: 3px dashed #2f6fd0; stroke: #2f6fd0; stroke-dasharray: 6 3 }`

/** Refreshes itself without a script; `?pause` stops that. */
function renderPage(known: Status, exchange: Exchange, nonce: string): string {
  const offered = [...commands].filter(([, entry]) => entry.http && !entry.hidden)
  const isPaused = parseTarget(exchange.response.req.url ?? '').query === 'pause'
  const refresh = isPaused ? '' : '<meta http-equiv="refresh" content="2">'
  const toggle = isPaused ? '<a href="/">Refresh</a>' : '<a href="?pause">Pause</a>'
  const heading = headingOf(known)
  const identity = describeProcess(exchange)
  return `<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">${refresh}
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>${escapeHtml(`${GRADE_MARKS[known.grade]} ${identity} - ${heading}`)}</title>
<style nonce="${nonce}">${PAGE_STYLE}</style></head><body><main>
<h1 class="${known.grade}">${escapeHtml(heading)}</h1>
<p>${pageText(sinceWhen(known))}<br>${pageText(identity)}<p>${toggle}
<table>
${rowsOf(known).sort(byGrade).map(pageRow).join('\n')}
</table>
${renderChart(known, loadHistories.get(loadOf(monitor))?.seconds ?? [])}
<p>${offered.map(([name]) => pageLink(name)).join(' ·\n')}
<p>ftw-monitor ${VERSION}</main></body></html>
`
}

/** All of a title that narrow tabs show is its beginning. */
const GRADE_MARKS = { pass: '✓', warn: '…', fail: '✗' } as const

function headingOf(known: Status): string {
  const text = describeState(known)
  if (known.draining?.shutdown) return `${text} (shutting down)`
  return known.draining?.finished ? `${text} (finished)` : text
}

function sinceWhen({ changes }: Status): string {
  const { time } = changes.at(-1)!
  return `For ${duration((Date.now() - Date.parse(time)) / 1_000)}, since ${toSecond(time)}`
}

/** Tells the tabs of several instances apart: `web1, process 4711, shop 2.3.1`. A stranger sees the
 *  host alone that they asked for. */
function describeProcess({ local, response }: Exchange): string {
  if (!local) return nameInHost(response.req.headers.host ?? '') || 'localhost'
  const parts = [readEnv('HOSTNAME') ?? boundPlace(), `process ${process.pid}`]
  const name = readEnv('npm_package_name') // npm sets it for what `npm start` runs
  const version = readEnv('npm_package_version') ?? ''
  if (name !== undefined) parts.push(`${name} ${version}`.trim())
  return parts.join(', ')
}

/** What the instance is bound to, `[::]:8080`; `port 8080` where its server is not known. */
function boundPlace(): string {
  const { traffic, instance } = monitor
  const bound = traffic.server?.address()
  if (bound) return describeAddress(bound)
  const { path, port } = instance?.location ?? {}
  return path ?? `port ${port}`
}

const GRADE_ORDER = ['fail', 'warn', 'pass']

/** What is not as it should be comes first. */
function byGrade(one: Row, other: Row): number {
  return GRADE_ORDER.indexOf(one.grade) - GRADE_ORDER.indexOf(other.grade)
}

function pageRow({ kind, name, text, grade, progress }: Row): string {
  const head = `<tr class="${grade}"><th scope="row">${pageText(kind)}`
  const title = name === '' ? '<td colspan="2">' : `<td>${escapeHtml(name)}<td>`
  const sign = progress === undefined ? '' : progressSign(`${kind} ${name}`, progress)
  return `${head}${title}${sign}${pageText(text)}`
}

/** A tick, or a bar, which moves to and fro without a value. */
function progressSign(label: string, progress: number): string {
  if (progress === 1) return '✓ '
  const value = progress < 0 ? '' : ` value="${progress}"`
  return `<progress aria-label="${escapeHtml(label)}"${value}></progress> `
}

/** A number stays on one line with its unit. */
function pageText(text: string): string {
  return escapeHtml(text).replace(BLANK_BEFORE_UNIT, '\u00a0')
}

const BLANK_BEFORE_UNIT = /(?<=\d) (?=[a-z%])/gi // 3 ms, 17 %, 71 MiB, 2 requests

function escapeHtml(text: string): string {
  return clean(text).replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`)
}

function pageLink(name: string): string {
  return `<a href="/${encodeURIComponent(name)}">${escapeHtml(name)}</a>`
}

/** The busy part of the event loop and, where they are seen, requests a second, over the last two
 *  minutes; below them, when the instance was green, amber or red. */
function renderChart(known: Status, seconds: Second[]): string {
  const nowMs = performance.now()
  const shown = seconds.map(({ endedAtMs, utilization, requests, seconds: length }) => ({
    x: CHART_SECONDS - (nowMs - endedAtMs) / 1_000,
    load: Math.max(0, utilization),
    rate: requests / length
  }))
  const rates = shown.map(({ rate }) => rate)
  const most = scaleFor(Math.max(0, ...rates))
  const busy = `loop ${percentage(Math.max(0, known.eventLoopUtilization))} % busy`

  const scales = [chartLabel('load', '100 % busy')]
  const lines = [
    polyline(
      'load',
      shown.map(({ x, load }) => [x, load])
    )
  ]
  const latest = [chartLabel('load', busy)]
  const areRequestsKnown = known.requestsInFlight >= 0
  if (areRequestsKnown) {
    scales.push(chartLabel('requests', describeRate(most)))
    lines.push(
      polyline(
        'requests',
        shown.map(({ x, rate }) => [x, rate / most])
      )
    )
    latest.push(chartLabel('requests', describeRate(Math.round(rates.at(-1) ?? 0))))
  }
  const box = `viewBox="0 0 ${CHART_SECONDS} 100" preserveAspectRatio="none" aria-hidden="true"`
  return `<figure><div>${scales.join('\n')}</div>
<svg ${box}>
${lines.join('\n')}
</svg><svg class="axis" ${box}>
${gradeMarks(known.changes)}
</svg><div><span>two minutes ago</span> <span>now</span></div>
<figcaption>Now: ${latest.join(',\n')}</figcaption></figure>`
}

const SCALE_MIN = 10 // requests a second: a single one is not to look like a flood

/** Returns 10, 20, 50, 100 and so on, so that the scale does not change with each request. */
function scaleFor(most: number): number {
  let scale = SCALE_MIN
  while (scale < most) scale *= String(scale).startsWith('2') ? 2.5 : 2
  return scale
}

function chartLabel(name: string, text: string): string {
  return `<span class="${name}">${pageText(text)}</span>`
}

function describeRate(requests: number): string {
  return `${plural(requests, 'request', 'requests')} a second`
}

/** Draws points whose height is from 0 to 1; those before the last two minutes are cut off. */
function polyline(name: string, points: [x: number, height: number][]): string {
  const inside = points.filter(([x]) => x >= 0)
  const pairs = inside.map(([x, height]) => `${x.toFixed(1)},${(99 - 98 * height).toFixed(1)}`)
  return `<polyline class="${name}" points="${pairs.join(' ')}"/>`
}

/** One mark from each change of the verdict to the next. */
function gradeMarks(changes: Status['changes']): string {
  const starts = changes.map(({ time }) => CHART_SECONDS - (Date.now() - Date.parse(time)) / 1_000)
  const marks = changes.map(({ grade }, index) => {
    const from = Math.max(0, starts[index] ?? 0)
    const to = Math.max(0, starts[index + 1] ?? CHART_SECONDS)
    const width = (to - from).toFixed(1)
    return `<rect class="${grade}" x="${from.toFixed(1)}" width="${width}" height="100"/>`
  })
  return marks.join('\n')
}

// --- Layer: the program; all from here on may be deleted, and nothing above refers to it ---------

//   Called or imported

/** Runs the program, and returns its exit status. */
async function main(words: string[]): Promise<number> {
  const call = parseCall(words)
  if (call.options.has('--help') || call.options.has('-h')) return print(USAGE)
  if (call.options.has('--version')) return print(VERSION)

  if (!isOwnCommand(call.name)) sortWords(call)
  switch (call.name) {
    case 'demo':
      return runDemo(call)
    case 'dump-perf-metrics':
      return dumpPerfMetrics(call)
    case 'wait':
      return waitUntilHealthy(call)
    case 'status':
      return showStatus(call)
    default:
      return sendCommand(call)
  }
}

const USAGE = `ftw-monitor COMMAND [INSTANCE] [ARGS…]
                                  sends a command, and prints the reply
ftw-monitor                       lists the commands, as ftw-monitor help does
ftw-monitor interactive           joins the terminal to the monitor, until quit
ftw-monitor wait [--timeout 300] [--pid PID]
                                  waits until the instance is healthy, or its process is gone
ftw-monitor status [--watch | --json] [INSTANCE…]
                                  shows how the instance is, or a line for each of several; as
                                  JSON: [{ name, reachable, healthy, reason, uptimeSeconds,
                                  requestsInFlight, eventLoopUtilization, residentMemoryBytes }]
ftw-monitor dump-perf-metrics [--deployment NAME] INSTANCE…
                                  prints the figures of instances for InfluxDB
ftw-monitor demo                  runs a small instance to try everything on

INSTANCE    [NAME=][HOST:]PORT, the instance's own port: app1=10301, [::1]:10301. Where a number
            may be an argument, as for drain, it is app1=10301 or --port 10301.
--port N    the instance's port (default: PORT, else 8080)
--host H    the host of instances that are named without one (default: HOST, else localhost)
--          What follows is an argument as it is: drain -- --odd reason=5
--help, -h, --version

An unknown option, or an argument too many, sends nothing. Commands of your own service get all
words but --port and --host.

Exit status: 0; 1 where the instance is not healthy, or its reply is an error; 2 where the monitor
cannot be reached, does not know the command, or the call is wrong.`

function print(text: string): number {
  console.log(text)
  return 0
}

// The words of a call. What is not certain is refused: a command that reaches another instance than
// the one that was meant is worse than none.

/** What the words of a call say. */
interface Call {
  /** The command. */
  name: string
  /** The options that were given, with their values; '' where they have none. */
  options: Map<string, string>
  /** The instances that words name. */
  instances: Instance[]
  /** The arguments of the command. */
  words: string[]
  /** Those that stand after `--`, and are neither options nor instances. */
  wordsAsTheyAre: string[]
}

/** An instance as it was named, and where its monitor listens. */
interface Instance {
  name: string
  to: net.NetConnectOpts
  namedBy: NamedBy
}

/** A word or an option of the call; without them the environment: PORT, which is 8080 if it is not
 *  set, or FTW_MONITOR_LISTEN, which names the monitor and not the instance. */
type NamedBy = 'word' | 'option' | 'PORT' | 'FTW_MONITOR_LISTEN'

/** What the program does by itself, beside the commands of a monitor. */
const PROGRAM_COMMANDS = ['wait', 'status', 'dump-perf-metrics', 'demo']

/** The command that has an option, where it is not one of all commands; and whether a value follows
 *  it. */
interface Option {
  command?: string
  hasValue: boolean
}

const OPTIONS = new Map<string, Option>([
  ['--port', { hasValue: true }],
  ['--host', { hasValue: true }],
  ['--help', { hasValue: false }],
  ['-h', { hasValue: false }],
  ['--version', { hasValue: false }],
  ['--timeout', { command: 'wait', hasValue: true }],
  ['--pid', { command: 'wait', hasValue: true }],
  ['--watch', { command: 'status', hasValue: false }],
  ['--json', { command: 'status', hasValue: false }],
  ['--deployment', { command: 'dump-perf-metrics', hasValue: true }]
])

/** The arguments of a monitor's commands; all others have none. */
const ARGUMENTS = new Map([
  ['help', '[NAME]'],
  ['monitor', '[AGE] [DATABASE]'],
  ['dbinfo', '[DATABASE] [SECONDS]'],
  ['perf_metrics', '[DATABASE] [SECONDS]'],
  ['zeocache', '[DATABASE]'],
  ['zeostatus', '[DATABASE]'],
  ['warmup', '[SITE]'],
  ['drain', '[REASON…]']
])

function parseCall(words: string[]): Call {
  const call: Call = {
    name: '',
    options: new Map(),
    instances: [],
    words: [],
    wordsAsTheyAre: []
  }
  const rest = [...words]
  while (rest[0]?.startsWith('-')) takeOption(rest, call)
  const [name = '', ...quoted] = wordsOf(rest.shift() ?? 'help')
  if (name === '') failWith('the command is empty; try ftw-monitor --help')
  call.name = name
  if (isOwnCommand(name)) call.words.push(...quoted)
  else rest.unshift(...quoted)

  const endOfOptions = rest.indexOf('--')
  if (endOfOptions >= 0) call.wordsAsTheyAre = rest.splice(endOfOptions)
  while (rest[0] !== undefined) {
    if (isOption(rest[0], call.name)) takeOption(rest, call)
    else call.words.push(...rest.splice(0, 1))
  }
  if (isOwnCommand(call.name)) call.words.push(...call.wordsAsTheyAre)
  else call.wordsAsTheyAre.shift()
  return call
}

/** Whether a service has registered it, or nobody has: only the monitor knows its arguments. */
function isOwnCommand(name: string): boolean {
  return !commands.has(name) && !PROGRAM_COMMANDS.includes(name)
}

function isOption(word: string, name: string): boolean {
  if (isOwnCommand(name)) return /^--(port|host)(=|$)/.test(word)
  return /^-./.test(word) // `-` alone is the main database
}

/** Takes an option, and its value, from the beginning of the words. */
function takeOption(rest: string[], { name, options }: Call): void {
  const [, option = '', inlineValue] = OPTION.exec(rest.shift() ?? '') ?? []
  const { command = name, hasValue } = OPTIONS.get(option) ?? refuseOption(option, name)
  if (command !== name) refuseOption(option, name)
  if (options.has(option)) failWith(`${option} is given twice`)
  if (hasValue) options.set(option, checkedValue(option, inlineValue ?? rest.shift()))
  else if (inlineValue === undefined) options.set(option, '')
  else failWith(`${option} takes no value`)
}

/** A variable of the shell that is not set leaves no value, or the next option in its place. */
function checkedValue(option: string, value = ''): string {
  if (value === '' || value.startsWith('--')) failWith(`${option} needs a value`)
  return value
}

function refuseOption(option: string, name: string): never {
  if (name === '') failWith(`knows no ${option} before the command; try ftw-monitor --help`)
  if (name !== 'drain') failWith(`${name} knows no ${option}; try ftw-monitor --help`)
  return failWith(`drain knows no ${option}; a reason with dashes comes after --`)
}

const OPTION = /^([^=]*)(?:=(.*))?$/s // --port, --port=10301

/** Tells the instances among the words of a command that the program knows. */
function sortWords(call: Call): void {
  const { name, options, wordsAsTheyAre } = call
  if (call.words.some((word) => word.trim() === '')) {
    failWith(`${name} has an empty argument: is a variable not set?`)
  }

  const isInstance = (word: string): boolean => isForInstance(word, name)
  const words = name === 'drain' ? wordsOfDrain(call) : call.words
  const named = words.filter(isInstance)
  const others = words.filter((word) => !isInstance(word))
  call.instances = named.map((word) => readInstance(word, options.get('--host')))
  call.words = [...others.flatMap(wordsOf), ...wordsAsTheyAre]

  checkInstances(call)
  if (name !== 'drain') checkSurplus(call)
}

/** As the monitor takes them, for which quotation marks are none. */
function wordsOf(text: string): string[] {
  return text.trim().split(/\s+/)
}

/** A bare number is an instance's port where it can be nothing else; a site begins with a slash. */
function isForInstance(word: string, name: string): boolean {
  if (name === 'demo' || word.startsWith('/')) return false
  if (LIKE_INSTANCE.test(word)) return true
  return /^\d+$/.test(word) && (name === 'warmup' || !ARGUMENTS.has(name))
}

/** What is meant for an instance, well or badly: `app1=10301`, `host:10301`, `::1:10301`; but not
 *  `12:30`, which is a time. */
const LIKE_INSTANCE = /=|::|[a-z.\]].*:\d+$/i

/** A reason may be any text, so the instance is the first word, and named as nothing else is. */
function wordsOfDrain(call: Call): string[] {
  const words = call.words.flatMap(wordsOf)
  const [first = '', ...others] = words
  if (/^\d+$/.test(first)) {
    const asReason = `drain -- ${words.join(' ')}`
    failWith(`${first} may be a port or a reason: say drain --port ${first}, or ${asReason}`)
  }
  if (!isForInstance(first, 'drain') && LIKE_HOST_AND_PORT.test(first)) {
    const howNamed = 'one is named [NAME=][HOST:]PORT, and a reason that looks so comes after --'
    failWith(`${first} may be an instance or a reason: ${howNamed}`)
  }
  const later = others.find((word) => isForInstance(word, 'drain'))
  if (later !== undefined) {
    failWith(`${later} may be an instance: that comes first, and a reason that looks so after --`)
  }
  return words
}

const LIKE_HOST_AND_PORT = /[a-z.\]].*:\d/i // 127.0.0.1:10301x; not the time 12:30

function checkInstances({ name, options, instances }: Call): void {
  const [first, second] = instances.map((instance) => instance.name)
  const port = options.get('--port')
  if (first === undefined) return
  if (port !== undefined) failWith(`--port ${port} and ${first} are two instances: name one`)
  if (second === undefined || MANY_INSTANCES.includes(name)) return
  failWith(`${name} takes one instance, not ${first} and ${second}`)
}

/** The commands that take any number of instances. */
const MANY_INSTANCES = ['status', 'dump-perf-metrics']

function checkSurplus({ name, words }: Call): void {
  const usage = ARGUMENTS.get(name)?.split(' ') ?? []
  const surplus = words[usage.length]
  if (surplus === undefined) return
  const instances = MANY_INSTANCES.includes(name) ? '[INSTANCE…]' : '[INSTANCE]'
  const taken = name === 'demo' ? 'options alone' : [instances, ...usage].join(' ')
  failWith(`cannot use '${surplus}': ${name} takes ${taken}; try ftw-monitor --help`)
}

/** The instance that is named, else the one of the options and the environment. */
function instanceOf({ instances, options }: Call): Instance {
  const [named] = instances
  if (named) return named
  const port = options.get('--port')
  const to = findMonitor(port, options.get('--host'))
  return {
    name: monitorPlace(to),
    to,
    namedBy: port === undefined ? namedByEnvironment(to) : 'option'
  }
}

function namedByEnvironment(to: net.NetConnectOpts): NamedBy {
  const isMonitorNamed = 'path' in to || endpointInEnvironment().port !== undefined
  return isMonitorNamed ? 'FTW_MONITOR_LISTEN' : 'PORT'
}

/** The instance as whoever called has named it, or would. */
function instancePlace({ name, to, namedBy }: Instance): string {
  if (namedBy === 'word' || 'path' in to) return name
  if (namedBy === 'FTW_MONITOR_LISTEN') return monitorPlace(to)
  return monitorPlace({ ...to, port: to.port - PORT_OFFSET })
}

function monitorPlace(to: net.NetConnectOpts): string {
  if ('path' in to) return to.path
  return `${hostInUrl(to.host ?? '')}:${to.port}`
}

async function sendCommand(call: Call): Promise<number> {
  const line = [call.name, ...call.words].join(' ').trim()
  if (/[\r\n]/.test(line)) failWith('a command is one line')

  const wordsOfLine = line.split(/\s+/)
  const [name = ''] = wordsOfLine
  const instance = instanceOf(call)
  const socket = net.connect(instance.to)
  if (name === 'interactive') joinTerminal(socket)
  resetAtSignal(socket, name)
  const printer = name === 'drain' ? new DrainPrinter(instancePlace(instance)) : undefined
  const show = (part: string): void => (printer ? printer.print(part) : printPart(part))
  try {
    const asked = talk(socket, `${line}\n`, limitsOf(name), show).catch((error: unknown) => {
      throw error instanceof LateError ? new Error(error.message + sequelOf(name)) : error
    })
    return exitStatus(wordsOfLine, await tellingWhom(instance, asked))
  } finally {
    printer?.finish()
  }
}

function limitsOf(name: string): TalkLimits {
  if (name === 'interactive') return { firstMs: SILENCE_MS, nextMs: SILENCE_MS }
  const firstMs = QUICK_COMMANDS.includes(name) ? STATUS_ANSWER_MS : COMMAND_MS
  return { firstMs, nextMs: COMMAND_MS }
}

/** Commands that wait for one answer of a database or check at most. A script that asks them is to
 *  know soon that an instance hangs; whatever changes something may well wait until it goes on. */
const QUICK_COMMANDS = [
  'agent_check',
  'dbinfo',
  'health_check',
  'help',
  'livez',
  'monitor',
  'quit',
  'readyz',
  'warmup_state',
  'zeocache',
  'zeostatus'
]

/** What may become of a command that was not answered: an instance that hangs reads it when it goes
 *  on. It refuses `drain`, `resume` and `warmup` of a client that has reset its connection; but
 *  there is no reset of a Unix socket, a tunnel may swallow it, and the line may have been read. */
function sequelOf(name: string): string {
  if ([...QUICK_COMMANDS, ...SLOW_QUERIES].includes(name)) return ''
  const sequel = `; ${name} may still be carried out`
  if (name === 'drain') return `${sequel}: ask status, then resume`
  return isOwnCommand(name) ? sequel : `${sequel}: ask status`
}

/** Commands that change nothing either, but may take longer. */
const SLOW_QUERIES = ['metrics', 'perf_metrics', 'interactive']

/** Whoever is interrupted takes the command back, if it was not read yet. */
function resetAtSignal(socket: net.Socket, name: string): void {
  const sequel = sequelOf(name)
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
    process.once(signal, () => {
      if (socket.bytesRead === 0 && sequel !== '') complain(`no answer before ${signal}${sequel}`)
      reset(socket)
      process.kill(process.pid, signal) // now that nobody listens for it, it ends us
    })
  }
}

/** A client that is gone without a reset looks like `nc -N`, which has sent all and still reads. */
function reset(socket: net.Socket, error?: Error): void {
  attempt(() => socket.resetAndDestroy()) // Unix sockets have none
  socket.destroy(error)
}

/** Prints the reply of `drain`. The first line names the instance. Progress is printed once a
 *  second at most, since the figures of a busy instance flicker; what follows it, at once. */
class DrainPrinter {
  readonly #place: string
  #isFirst = true
  #unfinishedLine = ''
  #pendingLine = ''
  /** Runs for a second from each line of progress that was printed. */
  #timer: ReturnType<typeof setTimeout> | undefined

  constructor(place: string) {
    this.#place = place
  }

  print(part: string): void {
    const lines = (this.#unfinishedLine + part).split('\n')
    this.#unfinishedLine = lines.pop() ?? ''
    for (const line of lines) this.#takeLine(line)
  }

  #takeLine(line: string): void {
    if (!line.startsWith('Draining: ')) {
      this.#pendingLine = '' // it is out of date
      printPart(`${line}\n`)
      return
    }
    this.#pendingLine = this.#isFirst
      ? line.replace('Draining', () => `Draining ${this.#place}`)
      : line
    this.#isFirst = false
    if (this.#timer === undefined) this.#printPending()
  }

  #printPending(): void {
    this.#timer = undefined
    if (this.#pendingLine === '') return
    printPart(`${this.#pendingLine}\n`)
    this.#pendingLine = ''
    this.#timer = setTimeout(() => this.#printPending(), PROGRESS_MS).unref()
  }

  /** Prints what has no line feed. */
  finish(): void {
    printPart(this.#unfinishedLine)
  }
}

const PROGRESS_MS = 1_000

/** A reply, or a failure that tells who was asked. No reply at all is none, as through a tunnel to
 *  nowhere. */
async function tellingWhom(instance: Instance, asked: Promise<string>): Promise<string> {
  const { name, to } = instance
  const place = monitorPlace(to)
  const shown = name === place ? place : `${name} at ${place}`
  const reply = await asked.catch((error: unknown) =>
    failWith(`cannot ask ${shown}: ${errorText(error)}${hintAfter(error, instance)}`)
  )
  return reply || failWith(`cannot ask ${shown}: no answer`)
}

/** Where nobody listens, perhaps the port was not that of an instance. */
function hintAfter(error: unknown, { namedBy }: Instance): string {
  const { code } = error as NodeJS.ErrnoException
  if (code !== 'ECONNREFUSED' || namedBy === 'FTW_MONITOR_LISTEN') return ''
  if (namedBy === 'PORT') return ' (name the instance: --port N)'
  return ` (an instance is named by its own port; its monitor is ${PORT_OFFSET} higher)`
}

function exitStatus(words: string[], reply: string): number {
  const [name = 'help', argument = ''] = words
  if (reply === unknownCommand(name === 'help' ? argument : name)) return 2
  const hasSucceeded = SUCCESSES.get(name)
  if (hasSucceeded) return hasSucceeded(reply) ? 0 : 1
  return hasFailed(name, reply) ? 1 : 0
}

const isOk = (reply: string): boolean => reply === 'OK\n'

/** Commands that have succeeded only if their reply is a certain one. */
const SUCCESSES = new Map<string, (reply: string) => boolean>([
  ['health_check', isOk],
  ['readyz', isOk],
  ['agent_check', (reply) => reply.startsWith('up ')],
  ['zeostatus', (reply) => reply === 'True\n'],
  ['perf_metrics', (reply) => reply.startsWith('{"instance"')],
  ['drain', (reply) => reply.endsWith(`${DRAINED}\n`)],
  ['warmup', (reply) => reply.endsWith(`${WARMED_UP}\n`)],
  ['interactive', () => true]
])

/** Our refusals have fixed texts; what a command throws is a last line that begins with a word in
 *  `Error`. */
function hasFailed(name: string, reply: string): boolean {
  if (reply === forThisMachine(name) || reply === LINE_TOO_LONG) return true
  return FAILURE.test(reply.slice(reply.lastIndexOf('\n', reply.length - 2) + 1))
}

const FAILURE = /^\w*Error: / // RangeError: no such queue

function joinTerminal(socket: net.Socket): void {
  socket.on('close', () => process.stdin.destroy())
  process.stdin.pipe(socket)
}

function printPart(part: string): void {
  process.stdout.write(part.replace(/[^\n\t]+/g, clean))
}

/** Where the monitor listens: as the options say, else as the instance itself would find out. */
function findMonitor(instancePort?: string, instanceHost?: string): net.NetConnectOpts {
  const told = instancePort === undefined ? endpointInEnvironment() : {}
  if (told.path !== undefined && instanceHost === undefined) return { path: told.path }

  const bound = instanceHost ?? told.host ?? readEnv('HOST') ?? ''
  const port = told.port ?? monitorPortBeside(instancePort)
  return { host: hostReaching(withoutBrackets(bound)), port }
}

/** As net.connect takes it: `::1` of `[::1]`. */
function withoutBrackets(host: string): string {
  return host.replace(/^\[(.*)\]$/, '$1')
}

/** The monitor's port, which is that of the instance + 80. A wrong one tells where it is from. */
function monitorPortBeside(portInCall?: string): number {
  const instancePort = portInCall ?? portInEnvironment()
  const port = toPort(instancePort)
  const monitorPort = port === undefined ? undefined : toPort(String(port + PORT_OFFSET))
  if (monitorPort !== undefined) return monitorPort

  const shown = portInCall ?? `PORT=${instancePort}`
  if (!isPath(instancePort)) failWith(`${shown} is no instance port`)
  return failWith(`${shown} is no port; a socket is named by FTW_MONITOR_LISTEN`)
}

function portInEnvironment(): string {
  return readEnv('PORT') ?? '8080'
}

/** Reads `10301`, `host:10301`, `[::1]:10301` or `web1=10301`. */
function readInstance(word: string, defaultHost?: string): Instance {
  const [, name = word, address = ''] = NAMED_INSTANCE.exec(word) ?? []
  const { host = defaultHost, port } = toEndpoint(address) ?? {}
  if (port === undefined || /\s/.test(address)) {
    failWith(`${word} is no instance; one is named [NAME=][HOST:]PORT`)
  }
  return { name, to: findMonitor(String(port), host), namedBy: 'word' }
}

const NAMED_INSTANCE = /^(?:([^=]+)=)?(.*)$/s // web1=10301

/** How long to wait for the whole reply; or, where its parts are shown as they come, for the first
 *  of them, and for each that follows. */
interface TalkLimits {
  firstMs: number
  nextMs?: number
}

class LateError extends Error {}

/** Sends text, and returns all that comes back until the other side closes. */
async function talk(
  socket: net.Socket,
  text: string,
  { firstMs, nextMs = firstMs }: TalkLimits,
  showPart?: (part: string) => void
): Promise<string> {
  let late: LateError | undefined
  const giveUpAfter = (limitMs: number): ReturnType<typeof setTimeout> => {
    const giveUp = (): void => {
      late = new LateError(`no answer within ${limitMs / 1_000} s`)
      reset(socket, late)
    }
    return setTimeout(giveUp, limitMs).unref()
  }
  let timer = giveUpAfter(firstMs)
  socket.setEncoding('utf8').write(text)

  let reply = ''
  try {
    for await (const part of socket as AsyncIterable<string>) {
      reply = (reply + part).slice(0, UNSENT_MAX)
      if (!showPart) continue
      showPart(part)
      clearTimeout(timer)
      timer = giveUpAfter(nextMs)
    }
  } catch (error) {
    throw late ?? error // a reset leaves no error of its own
  }
  return reply
}

const FIGURES_ANSWER_MS = 1_000 // as in ftw.monitor
const STATUS_ANSWER_MS = 2_000 // a database has most of a second to answer

/** Waits until the instance is healthy, and prints why it is not. */
async function waitUntilHealthy(call: Call): Promise<number> {
  const instance = instanceOf(call)
  const timeoutSeconds = Number(call.options.get('--timeout') ?? '300')
  if (!(timeoutSeconds >= 0)) failWith('--timeout needs a number of seconds')
  const pid = readPid(call.options.get('--pid'))

  const isOff = isSwitchedOff('FTW_MONITOR')
  if (isOff) console.log('FTW_MONITOR is off: waits for the port of the instance alone')

  let progressBefore = ''
  for (;;) {
    const progress = await (isOff ? askPort(instance) : askProgress(instance.to))
    if (pid !== undefined && (await isProcessGone(pid))) {
      console.log(`process ${pid} is gone`)
      return 1 // even if something else is healthy there
    }
    if (progress !== progressBefore) console.log(`${process.uptime().toFixed(1)} s  ${progress}`)
    progressBefore = progress
    if (progress === 'OK') return 0
    if (process.uptime() > timeoutSeconds) {
      console.log(`timed out after ${timeoutSeconds} s: ${progress}`)
      return 1
    }
    await wakeAfter(TICK_MS)
  }
}

/** 0 and negative numbers would be groups of processes. */
function readPid(text: string | undefined): number | undefined {
  if (text === undefined) return undefined
  const pid = Number(text)
  const isPid = /^\d+$/.test(text) && pid > 0 && pid <= PID_MAX
  return isPid ? pid : failWith(`--pid needs the number of a process, not '${text}'`)
}

const PID_MAX = 2 ** 31 - 1 // what process.kill takes

async function isProcessGone(pid: number): Promise<boolean> {
  try {
    process.kill(pid, 0)
  } catch (error) {
    return (error as NodeJS.ErrnoException).code !== 'EPERM' // somebody else's
  }
  return isUnreaped(pid)
}

/** Where there is /proc: a process that has ended, and whose parent has not asked how, has no
 *  program any more. Of what is no socket, connecting tells whether it is there. */
async function isUnreaped(pid: number): Promise<boolean> {
  if (await isAbsent(`/proc/${process.pid}/exe`)) return false
  return isAbsent(`/proc/${pid}/exe`)
}

function isAbsent(path: string): Promise<boolean> {
  return new Promise((resolve) => {
    const socket = net.connect({ path })
    socket.on('error', ({ code }: NodeJS.ErrnoException) => resolve(code === 'ENOENT'))
    socket.on('connect', () => {
      socket.destroy()
      resolve(false)
    })
  })
}

function wakeAfter(ms: number): Promise<void> {
  return new Promise((resolve) => {
    setTimeout(resolve, ms)
  })
}

/** Where the monitor is switched off nobody can tell more than whether the instance accepts
 *  connections; where only the monitor's address is known, not even that. */
function askPort({ to, namedBy }: Instance): Promise<string> {
  if (namedBy === 'FTW_MONITOR_LISTEN' || 'path' in to) return Promise.resolve('OK')
  return new Promise((resolve) => {
    const socket = net.connect({ ...to, port: to.port - PORT_OFFSET })
    socket.setTimeout(STATUS_ANSWER_MS, () => socket.destroy(new Error('no answer')))
    socket.on('error', (error) => resolve(clean(errorText(error))))
    socket.on('connect', () => {
      socket.destroy()
      resolve('OK')
    })
  })
}

async function askProgress(to: net.NetConnectOpts): Promise<string> {
  try {
    const { reason, checks } = await askStatus(to)
    const sites = checks['warmup:duration'] ?? []
    const running = sites.findIndex(({ stage }) => stage === 'running')
    if (reason !== WARMING_UP.reason || running < 0) return reason
    const site = clean(String(sites[running]?.componentId))
    return `${reason}: ${site}, ${running + 1} of ${sites.length}`
  } catch (error) {
    return clean(errorText(error))
  }
}

/** What the program reads of the JSON with which `status` replies over HTTP. */
interface SeenStatus {
  /** `OK`, or why it is not healthy. */
  reason: string
  checks: Record<string, { componentId?: string; observedValue: number; stage?: string }[]>
}

/** Asks for the status, which is no check, so that `drain` does not wait for us. Whatever else may
 *  answer there is not to be taken for a healthy instance. */
async function askStatus(to: net.NetConnectOpts): Promise<SeenStatus> {
  const request = 'GET /status HTTP/1.0\r\nHost: localhost\r\n\r\n'
  const reply = await talk(net.connect(to), request, { firstMs: STATUS_ANSWER_MS })
  if (reply === '') failWith('no answer')
  const [head = '', body = ''] = reply.split('\r\n\r\n')
  if (!head.includes(HEALTH_JSON)) failWith('what answers there gives no status')

  const known = JSON.parse(body) as { status?: Grade; output?: string } & Partial<SeenStatus>
  const { status: grade, output = 'no reason given', checks = {} } = known
  const isHealthy = grade === 'pass' || grade === 'warn'
  const reason = isHealthy ? 'OK' : toRedLine(output)
  return { reason, checks: Object(checks) as SeenStatus['checks'] }
}

/** Prints the status of one instance, or a line for each of several; once, or every second. */
async function showStatus(call: Call): Promise<number> {
  const { instances, options } = call
  const isJson = options.has('--json')
  if (isJson && options.has('--watch')) failWith('status takes --json or --watch, not both')
  if (isJson) return printStatuses(call)

  const [only = instanceOf(call)] = instances
  const ask = (): Promise<Shown> =>
    instances.length > 0 ? fleetStatus(instances) : ownStatus(only)
  if (options.has('--watch')) return watchStatus(ask)

  const { lines, healthy } = await ask()
  print(lines.join('\n'))
  return healthy ? 0 : 1
}

/** Prints one JSON document, also where nobody answers. */
async function printStatuses(call: Call): Promise<number> {
  const isFleet = call.instances.length > 0
  const all = await Promise.all((isFleet ? call.instances : [instanceOf(call)]).map(instanceStatus))
  print(JSON.stringify(all))
  if (!isFleet && !all[0]?.reachable) return 2
  return all.every(({ healthy }) => healthy) ? 0 : 1
}

/** Renews what is shown every second, in its place on a terminal, until Ctrl-C. */
async function watchStatus(ask: () => Promise<Shown>): Promise<never> {
  let exitCode = 1
  let rowsBefore = 0
  process.once('SIGINT', () => process.exit(exitCode))
  process.stdout.once('error', () => process.exit(exitCode)) // `| head -1`
  for (;;) {
    const { lines, healthy } = await ask().catch(unreachable)
    exitCode = healthy ? 0 : 1
    if (process.stdout.isTTY) rowsBefore = renewRows(lines, rowsBefore)
    else print(lines.join('\n'))
    await wakeAfter(WATCH_MS)
  }
}

const WATCH_MS = 1_000

/** Writes over the rows of the terminal that were printed before, and returns how many there are
 *  now. */
function renewRows(lines: string[], rowsBefore: number): number {
  const columns = terminalColumns()
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

/** The first line of the status is the verdict. */
async function ownStatus(instance: Instance): Promise<Shown> {
  const asked = talk(net.connect(instance.to), 'status\n', { firstMs: STATUS_ANSWER_MS })
  const reply = await tellingWhom(instance, asked)
  const lines = reply.trimEnd().split('\n').map(clean)
  return { lines, healthy: lines[0] === 'OK' }
}

/** The reason is last, since it may be long: a terminal shows what fits, a pipe all of it. */
async function fleetStatus(instances: Instance[]): Promise<Shown> {
  const all = await Promise.all(instances.map(instanceStatus))
  const figures = all.map(describeFigures)
  const nameWidth = Math.max(...all.map(({ name }) => name.length))
  const figuresWidth = Math.max(...figures.map(({ length }) => length))
  const lines = all.map(({ name, reason }, index) => {
    const cells = [name.padEnd(nameWidth), figures[index]?.padEnd(figuresWidth)]
    const head = `${cells.filter(Boolean).join('  ')}  `
    return head + cutToFit(reason, head.length)
  })
  return { lines, healthy: all.every(({ healthy }) => healthy) }
}

/** As much of a reason as fits into the line behind a head. */
function cutToFit(reason: string, headLength: number): string {
  if (!process.stdout.isTTY) return reason
  const width = Math.max(REASON_LEAST, terminalColumns() - headLength)
  return reason.length > width ? `${reason.slice(0, width - 1)}…` : reason
}

const REASON_LEAST = 30 // characters, also where the line is wrapped then

function terminalColumns(): number {
  return process.stdout.columns || 80 // some terminals do not know their size
}

/** One of what `status --json` prints, in the names of `status()`. What cannot be known is -1. */
interface InstanceStatus {
  name: string
  /** Whether its monitor answered. */
  reachable: boolean
  healthy: boolean
  /** `OK`, or why not. */
  reason: string
  uptimeSeconds: number
  requestsInFlight: number
  eventLoopUtilization: number
  residentMemoryBytes: number
}

/** Returns the verdict of an instance, and a few figures. */
async function instanceStatus({ name, to }: Instance): Promise<InstanceStatus> {
  const seen = await askStatus(to).catch(errorText)
  const isReached = typeof seen !== 'string'
  const reason = isReached ? seen.reason : toRedLine(seen)
  const figure = (measure: string): number => {
    const observed: unknown = isReached && seen.checks[measure]?.[0]?.observedValue
    return Number.isFinite(observed) ? Number(observed) : -1
  }
  return {
    name,
    reachable: isReached,
    healthy: reason === 'OK',
    reason,
    uptimeSeconds: figure('uptime'),
    requestsInFlight: figure('requests:inFlight'),
    eventLoopUtilization: figure('eventLoop:utilization'),
    residentMemoryBytes: figure('memory:resident')
  }
}

function describeFigures(seen: InstanceStatus): string {
  const { uptimeSeconds, requestsInFlight, eventLoopUtilization, residentMemoryBytes } = seen
  const figures: string[] = []
  if (uptimeSeconds >= 0) figures.push(`up ${duration(uptimeSeconds)}`)
  if (requestsInFlight >= 0) figures.push(`${requestsInFlight} in flight`)
  if (eventLoopUtilization >= 0) figures.push(`loop ${percentage(eventLoopUtilization)} %`)
  if (residentMemoryBytes >= 0) figures.push(`${Math.round(residentMemoryBytes / 2 ** 20)} MiB`)
  return figures.join(', ')
}

/** Prints the figures of many instances in InfluxDB's line protocol, as ftw.monitor does. */
async function dumpPerfMetrics(call: Call): Promise<number> {
  const port = call.options.get('--port')
  const byPort = port === undefined ? [] : [{ ...instanceOf(call), name: port }]
  const instances = [...call.instances, ...byPort]
  if (instances.length === 0) failWith('dump-perf-metrics needs instances, [NAME=][HOST:]PORT')

  const folder = process.cwd().replace(/.*[/\\]/, '')
  const deployment = escapeTag(call.options.get('--deployment') ?? folder)
  const lines = await Promise.all(instances.map((instance) => dumpInstance(instance, deployment)))
  process.stdout.write(lines.sort().join(''))
  return lines.some(Boolean) ? 0 : 1
}

/** Returns the line of an instance; '' after a complaint where there is none. */
async function dumpInstance({ name, to }: Instance, deployment: string): Promise<string> {
  try {
    const json = await talk(net.connect(to), 'perf_metrics\n', { firstMs: FIGURES_ANSWER_MS })
    const tags = `deployment=${deployment},process=${escapeTag(name)}`
    return `deployments,${tags} ${toFields(json)}\n`
  } catch (error) {
    complain(`${name}: ${errorText(error)}`)
    return ''
  }
}

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
async function runDemo({ options }: Call): Promise<number> {
  const portInCall = options.get('--port')
  const text = portInCall ?? portInEnvironment()
  const port = Number(text)
  if (!isPort(port)) failWith(`${portInCall ?? `PORT=${text}`} is no instance port`)

  const { loads } = registerDatabase('main', { isConnected: () => true })
  registerWarmup('/', () => new Promise((resolve) => setTimeout(resolve, 3_000).unref()))
  const server = http.createServer((_, response) => {
    loads()
    response.end('Hello from the demo of ftw-monitor\n')
  })
  shutdownOnSignal()
  server.on('error', complain)
  server.listen(port, withoutBrackets(options.get('--host') ?? readEnv('HOST') ?? ''))
  await start(server)
  return 0
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

// --- Called or imported --------------------------------------------------------------------------

// The CommonJS build has a line in place of this section, since there is no import.meta.

/** Whether this file was called, and not imported. A bundle of which it is a part may be called by
 *  any name, too, but does not export what this file does. */
async function isProgram(): Promise<boolean> {
  const calledUrl = urlCalled()
  if (calledUrl === undefined) return false
  try {
    const called = (await import(calledUrl)) as { start?: unknown } // it is loaded already
    return called.start === start
  } catch {
    return false
  }
}

/** The URL of what was called, if that may be this file. */
function urlCalled(): string | undefined {
  const meta: ImportMeta & { main?: boolean } = import.meta
  if (meta.main) return meta.url

  // Node.js 20 has no import.meta.main, and later ones deny it to what was preloaded as well. An
  // installed program is called by a link to it.
  const path = process.argv[1]?.replace(/[%?#\s]/g, encodeURIComponent)
  const url = attempt(() => new URL(`file:${path}`).href)
  if (url === meta.url) return url
  // Before Node.js 20.6 links could not be followed, so only the name of the installed one counts.
  if (!('resolve' in meta)) return url?.endsWith('/ftw-monitor') ? url : undefined
  return attempt(() => meta.resolve(String(url))) === meta.url ? url : undefined
}

async function runIfCalled(): Promise<void> {
  if (await isProgram()) await runProgram()
}

void runIfCalled()
