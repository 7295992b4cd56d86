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
// One verdict, "may this instance be sent requests, and if not, why", stands behind every reply.
// In the order of the file: types, limits, state, start and stop, the verdict, warm-up, draining,
// commands, figures, the wire (lines, then HTTP), and the program, which may be deleted.

import * as http from 'node:http'
import * as net from 'node:net'

// --- Types ---------------------------------------------------------------------------------------
/** What follows on a connection: its end, commands until `quit`, or lines for the same command. */
export type Mode = 'quit' | 'interactive' | 'more'
/** Who asks: `local` is on this machine; no address is known on a Unix socket and after a reset. */
export interface Connection {
  write(text: string): void
  readonly remoteAddress: string | undefined
  readonly local: boolean
}
/** Replies by `connection.write`, has 30 s for that, and may return the mode that follows. */
export type Command =
  (connection: Connection, ...args: string[]) => Mode | void | Promise<Mode | void>
/** `http` offers a command as `GET /NAME/ARG…`, which any web page can make a browser send;
 *  `local` refuses askers that are not on this machine. Neither by default, and never both. */
export interface CommandOptions { http?: boolean, local?: boolean }

/** An open connection of a database: since when (ms since 1970, or a Date), and for what. */
export interface OpenConnection { openedAt: number | Date, info: string }
/** What a database knows of itself, -1 where left out: objects in its caches, those of them that
 *  are loaded, and how many there may be; the cache's totals; conflicts in all and those not
 *  resolved, objects in the storage, and its size in bytes. */
export type Figures = Partial<Record<'size' | 'nonGhost' | 'maxSize' | 'recordsAdded' |
  'bytesAdded' | 'recordsEvicted' | 'bytesEvicted' | 'accesses' | 'conflicts' |
  'unresolvedConflicts' | 'objects' | 'bytes', number>>
/** Whatever the instance cannot serve without, with 900 ms to answer; only `true` is connected. */
export interface Database {
  isConnected(): boolean | Promise<boolean>
  connections?(): OpenConnection[] | Promise<OpenConnection[]>
  figures?(): Figures | Promise<Figures>
}
/** Count what the service does with a database; a `RangeError` for what is no number from 0. */
export type Activity = Record<'loads' | 'stores' | 'connections', (count?: number) => void>

/** Warms a site whose address on this instance is `url`; fails by throwing or rejecting. */
export type WarmupPerformer =
  (warmup: { site: string, url: string, signal: AbortSignal }) => unknown
/** Takes the few lines that the monitor has to say. */
export type Logger = Pick<Console, 'info' | 'warn' | 'error'>
/** An http, https or http2 `server`, listening or not yet; the instance's `port` (default: the
 *  server's, without one `PORT`); the `url` with scheme, name, port and path at which the instance
 *  reaches itself (`FTW_MONITOR_URL`); where to `listen` (`FTW_MONITOR_LISTEN`, else port + 80 on
 *  the instance's host); and a `logger` (`console`). */
export interface StartOptions {
  server?: net.Server, port?: number, url?: string, logger?: Logger,
  listen?: { host?: string, port?: number, path?: string }
}
/** The `reason` for probers (default `Draining`); how many red answers make a balancer act, its
 *  `fall` (3); and how many milliseconds to wait at most (25,000: Kubernetes kills at 30 s). */
export interface DrainOptions { reason?: string, fall?: number, timeoutMs?: number }

type Address = net.AddressInfo | string | false
type Run = { sites: string[], controller: AbortController, done: Promise<string> }
type Prober = { askedAt: number[], told: number }
type Entry = CommandOptions & { doc: string, command: (asker: Asker, ...args: string[]) => unknown,
  isReport?: true, mode?: Mode, type?: string | undefined, loggedAt?: number }
type Registered = { name: string, database: Database, counters: Record<keyof Activity, Counter>,
  asked: Partial<Record<keyof Database, Promise<unknown>>> } // the questions that are out

// --- Limits --------------------------------------------------------------------------------------
const PORT_OFFSET = 80 // as in ftw.monitor
const TICK_MS = 250 // of the one timer behind most limits; a warm-up is to abort within a second
const LISTEN_RETRY_MS = 1_000 // an old process holds our port a little longer
const LISTEN_WARNING_MS = 10_000 // by then somebody awaits start(server) before listen()
const ACCEPT_WARNING_MS = 20_000 // ftw.monitor's grace
const DATABASE_MS = 900 // Kubernetes waits for one second
const REASON_MAX = 500 // characters; balancers show less
const VIEW_MS = 10_000 // until the view has seen our token: some routes never answer
const WARMUP_MS = 30 * 60_000 // for one run, as in ftw.monitor
const [WARMUP_RETRY_MS, WARMUP_RETRY_MAX_MS] = [1_000, 30_000] // doubled from try to try
const [PROBER_ASKS, PROBER_MS, PROBERS_MAX] = [3, 60_000, 64] // who asks less is no balancer
const LOOKUPS_PER_TICK = 128 // an address is dear to look up; under a flood, drain waits longer
const [QUIET_MS, DRAIN_POLL_MS] = [100, 25] // a balancer must still read the last answer
const HISTORY_SECONDS = 3_600 // as far as zc.z3monitor looks back
const LOAD_SAMPLES = 40 // of the event loop, one a tick: ten seconds
const LOG_MS = 1_000 // between failures of a command, so that nobody can flood the host's log
const LINE_MAX = 4_096 // bytes: more than any command needs, and little of the host's memory
const LINES_PER_TURN = 16 // of one connection, then the host has its turn
const REQUESTS_PER_CONNECTION = 100 // the same for HTTP, where Node.js takes all there are at once
const CONNECTIONS_MAX = 256 // of the usual 1,024 descriptors; the others are the host's
const SEND_MS = 60_000 // for a line or an HTTP head: people type
const SILENCE_MS = 15 * 60_000 // in interactive mode: people think
const COMMAND_MS = 30_000 // by then every prober has given up
const LINGER_MS = 5_000 // for a peer to close after us
const UNSENT_MAX = 1_048_576 // bytes of a reply that nobody takes

// --- State ---------------------------------------------------------------------------------------
const commands = new Map<string, Entry>()
const databases = new Map<string, Registered>()
const performers = new Map<string, WarmupPerformer>()
const quiet = (): void => {}
/** What `start` sets. `stop` puts a new one in its place, by which whatever comes late knows. */
class State {
  options: StartOptions = {}
  settle: (address: Address | Promise<never>) => void = quiet // what start() promised
  ticker: ReturnType<typeof setInterval> | undefined
  clock = 0 // ms by ticks: it stands still while the host blocks, which is no prober's fault
  due = new Map<() => unknown, number>() // by that clock
  unhook = quiet
  instance: { host: string, port: number, path: string | undefined, url: string } | undefined
  accepting = false
  endpoint: net.ListenOptions = {}
  monitor: net.Server | undefined
  sessions = Array<Session | undefined>(CONNECTIONS_MAX).fill(undefined) // a Map keeps the dead
  inFlight = new Map<http.ServerResponse, { startedAt: number, line: string, socket: net.Socket }>()
  served = { requests: 0, errors: 0 }
  loads: object[] = []
  load = -1 // of the event loop, 0 to 1
  warmup: 'off' | 'cold' | 'done' | 'failed' = 'cold'
  failure = ''
  tried = new Map<string, string>() // sites: why each failed to warm up, '' where it did not
  runs: Run[] = [] // the first one is running
  view = { token: `${crypto.randomUUID()}`, controller: new AbortController(), isAsked: false }
  draining: { reason: string, waitFor: Prober[] } | undefined
  probers = new Map<string, Prober>() // the longest silent one first
  lookups = 0
}
let state = new State()

// --- Start and stop ------------------------------------------------------------------------------
/** Starts the monitor: `start(server)`, `start({ server, … })`, or `start()` where `PORT` is set.
 *  Do not await it before `server.listen()`: it waits for that. Resolves to the bound address, as
 *  `net.Server.address()` gives it, or, after one warning, to `false` where the environment forbids
 *  it (an address in use is tried again). Rejects with a `TypeError` or `RangeError` for misuse. */
export async function start(instance: net.Server | StartOptions = {}): Promise<Address> {
  const options: StartOptions = isServer(instance) ? { server: instance } : instance
  const { server, port, url, listen, logger = console, ...others }: StartOptions = Object(options)
  must(isObject(options) && Object.keys(others).length === 0, 'start() takes an ' +
    'http.Server (app.listen() of Express, fastify.server), or server, port, url, listen, logger')
  must(server === undefined || isServer(server), 'server must be an http, https or http2 server')
  must(port === undefined || (isPort(port) && port > 0), 'port must be a number from 1 to 65535',
    typeof port === 'number' ? RangeError : TypeError)
  must(url === undefined || toUrl(url), 'url must be an http or https URL')
  must(listen === undefined || isEndpoint(listen), 'listen must be { host, port } or { path }')
  must(can(logger, 'info', 'warn', 'error'), 'logger must have info, warn and error')
  if (isOff('FTW_MONITOR')) return false
  if (state.ticker) log('warn', 'is started already; stop() it first')
  if (state.ticker) return state.monitor?.address() ?? false
  return new Promise((settle) => {
    const unhook = server ? hook(server) : quiet
    Object.assign(state, { options, settle, unhook, ticker: setInterval(tick, TICK_MS).unref() })
    if (isOff('FTW_MONITOR_AUTOWARMUP')) state.warmup = 'off'
    later(server ? LISTEN_WARNING_MS : ACCEPT_WARNING_MS, () => state.accepting || log('warn',
      server ? 'waits for the server to listen' : `finds nothing at ${state.instance?.url}`))
    boot()
  })
}

/** Closes the monitor and its connections, aborts what runs, and takes its hook off the server.
 *  Resolves when the port is free. What was registered stays, and `start()` works again. */
export async function stop(): Promise<void> {
  const { ticker, due, unhook, settle, monitor, sessions, view, runs } = state
  state = new State()
  abort('the monitor was stopped', { view, runs })
  clearInterval(ticker)
  due.clear()
  unhook()
  for (const session of sessions) session?.socket.destroy()
  if (monitor?.listening) await new Promise((resolve) => monitor.close(resolve))
  settle(false)
}

function must(holds: unknown, sentence: string, Kind = TypeError): asserts holds {
  if (!holds) throw new Kind(`ftw-monitor: ${sentence}`)
}
const isObject = (value: unknown): value is Record<string, unknown> =>
  typeof value === 'object' && value !== null
const can = (value: unknown, ...methods: string[]): boolean =>
  isObject(value) && methods.every((name) => typeof value[name] === 'function')
// https and http2 servers are no http.Server, but do the same; a net.Server has no setTimeout
const isServer = (value: unknown): value is net.Server => can(value, 'listen', 'emit', 'setTimeout')
const isPort = (value: unknown): value is number => (Number(value) & 0xffff) === value // 16 bits
const toUrl = (url: string) => /^https?:/i.test(url) && URL.canParse(url) ? url : undefined
const isEndpoint = (value: unknown): boolean => isObject(value) && Object.entries(value).every(
  ([name, part]) => part === undefined || (name === 'port' ? isPort(part)
    : /^(host|path)$/.test(name) && typeof part === 'string' && part !== ''))

function tick(): void {
  state.clock += TICK_MS
  state.lookups = 0
  measureLoad()
  boot()
  if (isShuttingDown()) abort('the instance is shutting down')
  for (const [act, at] of state.due) if (at <= state.clock && state.due.delete(act)) act()
  for (const session of state.sessions) session?.enforceLimits()
  for (const [response, { socket }] of state.inFlight) { // some never get their 'close'
    if (!socket || socket.destroyed || response.destroyed) state.inFlight.delete(response)
  }
}
/** Has the ticker act, unless a stop() comes first. */
const later = (ms: number, act: () => unknown): unknown => state.due.set(act, state.clock + ms)

/** Takes the next steps from started to accepting, as far as they can be taken now. */
function boot(): void {
  const [starting, { server }] = [state, state.options]
  if (server?.listening === false || state.accepting) return
  try { starting.instance ??= locate() } catch (error) { return giveUp(error) }
  const accept = (): void => {
    if (starting !== state || state.accepting) return
    state.accepting = true
    if (state.warmup !== 'off') void warmUpAutomatically()
  }
  if (server || starting !== state) return accept() // else only connecting tells
  const socket = net.connect(starting.instance, accept).unref().on('error', quiet)
  socket.end().setTimeout(TICK_MS, () => socket.destroy())
}
function locate(): NonNullable<State['instance']> {
  const { server, port: given, url = env('FTW_MONITOR_URL', toUrl), listen: at } = state.options
  const bound = server ? server.address() : { address: env('HOST'),
    port: given ?? env('PORT', toPort) ?? refuse('needs a port: set PORT, or start(server)') }
  const { address = '', port: its = NaN }: { address?: string, port?: number } = Object(bound)
  const [port, reached] = [given ?? its, LOOPBACK.get(address) ?? address]
  const scheme = server && 'setSecureContext' in server ? 'https' : 'http'
  const origin = `${scheme}://${inUrl(reached)}${port ? `:${port}` : ''}`
  const base = String(url ?? origin).replace(/\/+$/, '')
  const { path, host = address, port: own = port + PORT_OFFSET } =
    at ?? env('FTW_MONITOR_LISTEN', toEndpoint) ?? {}
  must(path ?? (isPort(own) || (own > 0 && !given)), // else it is PORT's fault, and told later
    'the monitor belongs at port + 80, which is no port: say port or listen', RangeError)
  // exclusive: cluster workers would share the port, and answer for each other
  state.endpoint = { exclusive: true, ...path ? { path } : { port: own, ...host && { host } } }
  listen()
  return { host: reached, port, path: typeof bound === 'string' ? bound : undefined, url: base }
}
function listen(isRetry = false): void {
  const starting = state
  const monitor = state.monitor = net.createServer({ allowHalfOpen: true }, openSession).unref()
  monitor.on('listening', () => {
    if (starting !== state) return void monitor.close() // stopped while a name was looked up
    const at = monitor.address() ?? ''
    log('info', `listening on ${typeof at === 'string' ? at : `${inUrl(at.address)}:${at.port}`}`)
    state.settle(at)
  }).on('error', (error: NodeJS.ErrnoException) => {
    if (starting !== state || monitor.listening) return // a connection that it could not accept
    const text = `cannot listen: ${wording(error)}`
    if (error.code !== 'EADDRINUSE') return giveUp(new Refusal(`${text}; set FTW_MONITOR_LISTEN`))
    if (!isRetry) log('warn', `${text}; tries every second; an older process may hold it; ` +
      'cluster workers need FTW_MONITOR_LISTEN each; remove a dead path')
    state.settle(false)
    later(LISTEN_RETRY_MS, () => listen(true))
  })
  try { monitor.listen(state.endpoint) } catch (error) { monitor.emit('error', error) } // forbidden
}
/** What the environment does not allow is warned of; a caller's mistake rejects. */
function giveUp(error: unknown): void {
  if (error instanceof Refusal) log('warn', error.message)
  else state.settle(Promise.reject(error))
  void stop()
}
/** Where an instance is reached that is bound to no address in particular. */
const LOOPBACK = new Map([['', 'localhost'], ['0.0.0.0', '127.0.0.1'], ['::', '::1']])
const inUrl = (host: string): string => net.isIPv6(host) ? `[${host}]` : host

/** What the environment says, as `read` understands it; undefined where it says nothing. */
function env<T = string>(name: string, read = (text: string) => text as T | undefined) {
  const text = process.env[name]?.trim()
  return text ? read(text) ?? refuse(`cannot use ${name}=${text}; mend it`) : undefined
}
const isOff = (name: string): boolean => /^(0|false|no|off)$/i.test(env(name) ?? '')
const toPort = (text: string) => (isPort(Number(text)) && Number(text)) || undefined
/** `8160`, `host:8160`, `[::1]:8160`, or a path. */
function toEndpoint(text: string): StartOptions['listen'] {
  if (/[/\\]/.test(text)) return { path: text }
  const [, ipv6, host = ipv6, port] = /^(?:\[(.+)\]:|([^:[\]]+):)?(\d+)$/.exec(text) ?? []
  return isPort(Number(port)) ? { port: Number(port), ...host && { host } } : undefined
}

/** Wraps the server's `emit`, through which everything passes; gives what takes it off again. */
function hook(server: net.Server): () => void {
  const [starting, inner] = [state, server.emit]
  const own = Object.getOwnPropertyDescriptor(server, 'emit')
  const emit = function (this: net.Server, ...all: unknown[]): boolean {
    const isTaken = starting === state && attempt(() => takesOver(...all as [string, never, never]))
    return isTaken || Reflect.apply(inner, this, all)
  }
  Object.defineProperty(server, 'emit', { value: emit, configurable: true, writable: true })
  return () => {
    if (server.emit !== emit) return // whoever hooked in later still calls us
    Reflect.deleteProperty(server, 'emit')
    if (own) Reflect.defineProperty(server, 'emit', own) // must not throw, whatever befell it
  }
}
/** Sees all events first, of which a 'request' may be none; true for a request to us alone. */
function takesOver(event: string, request: http.IncomingMessage, response: http.ServerResponse) {
  if (event === 'listening') boot()
  if (event === 'close' && isShuttingDown()) void stop() // close() before listen() emits it, too
  if (event !== 'request' && event !== 'checkContinue') return false
  const { method, url = '', socket } = request
  const isView = warmupSite(url) !== undefined
  if (isView) warmupView(request, response)
  if (isView || state.inFlight.has(response)) return isView
  response.on('close', requestEnded)
  state.inFlight.set(response, { startedAt: performance.now(), line: `${method} ${url}`, socket })
  state.served.requests++
  if (state.draining) closeAfter(response)
  return false
}
function requestEnded(this: http.ServerResponse): void {
  if (state.inFlight.delete(this) && this.statusCode >= 500) state.served.errors++
}

// --- The verdict ---------------------------------------------------------------------------------
/** Tells whether this instance may be sent requests: reason `OK`, or why not, in one line that
 *  never contains `OK`. Answers within a second, and never rejects. */
export async function health(): Promise<{ healthy: boolean, reason: string }> {
  const reason = await verdict()
  return { healthy: reason === 'OK', reason }
}

/** `OK` or why not; every prober's reply is a rendering of it. A promise only if it must be. */
function verdict(asker?: Asker, worth = 1): string | Promise<string> {
  if (asker) noteProber(asker, worth)
  if (databases.size === 0 || state.draining || isShuttingDown()) return judge()
  return Promise.all([...databases.values()].map(trouble)).then((all) => judge(all.find(Boolean)))
}
/** Judges when the answer is due: what held when the databases were asked may be over. */
function judge(databaseTrouble = ''): string {
  if (state.draining) return red(state.draining.reason)
  if (isShuttingDown()) return 'Instance is shutting down'
  if (databaseTrouble) return red(`Error: ${databaseTrouble}`)
  if (!state.accepting || (state.warmup === 'cold' && !state.runs[0])) return 'Instance is booting'
  if (state.runs.length > 0) return 'Warmup in progress'
  return state.warmup === 'failed' ? red(`Warmup failed: ${state.failure}`) : 'OK'
}
/** Known at once, where `close` would tell only when the last slow request is gone. */
const isShuttingDown = (): boolean => state.accepting && state.options.server?.listening === false
/** What is not healthy becomes one line in which HAProxy's `expect string OK` finds nothing. */
const red = (text: string): string => clean(text).replaceAll('OK', 'O K').slice(0, REASON_MAX)
/** A blank, never nothing, for each character that could forge a line or steer a terminal. */
const clean = (text: string): string => text.replace(CONTROL, ' ')
const CONTROL = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu

/** What is wrong with a database; '' where nothing is. */
const trouble = (registered: Registered): Promise<string> => ask(registered, 'isConnected').then(
  (answer) => answer === true ? '' : 'disconnected.',
  (error: unknown) => error === TIMED_OUT ? 'timed out.' : `failed: ${wording(error)}`
).then((text) => text && `Database '${registered.name}' ${text}`)
const TIMED_OUT = new Error('no answer in time')
/** Asks a database. Who comes while a question is out shares it, so nobody multiplies queries. */
const ask = ({ database, asked }: Registered, method: keyof Database): Promise<unknown> =>
  asked[method] ??= new Promise((resolve, reject) => {
    // setImmediate: after the host blocked, what came in time is still to be read
    const timer = setTimeout(() => setImmediate(reject, TIMED_OUT), DATABASE_MS).unref()
    Promise.resolve().then(() => database[method]?.()).finally(() => {
      clearTimeout(timer)
      delete asked[method]
    }).then(resolve, reject)
  })

/** An error in words, never none: fetch hides them in `cause`, a refused localhost in `code`. */
const wording = (error: unknown): string => attempt(() => {
  if (!(error instanceof Error)) return String(error).slice(0, REASON_MAX)
  const { message, cause, code = '', name } = error as Error & { code?: string }
  if (message === 'fetch failed' && cause) return wording(cause)
  const advice = /_ALTNAME_/.test(code) ? '; set FTW_MONITOR_URL, or url, to a name that it has'
    : /^(UNABLE_|SELF_|DEPTH_)/.test(code) ? "; set NODE_EXTRA_CA_CERTS to its issuer's file" : ''
  return `${message || code || name}`.slice(0, REASON_MAX) + advice
}) || 'an error that cannot be put into words'
/** What others made may throw at every look. */
function attempt<T>(look: () => T): T | undefined {
  try { return look() } catch { return undefined }
}
/** Logs one line, and the frames of a stack. A logger that fails must not be the host's end. */
function log(level: keyof Logger, ...lines: string[]): void {
  const text = `ftw-monitor ${lines.map(clean).join('\n')}`
  new Promise((done) => done((state.options.logger ?? console)[level](text))).catch(quiet)
}

// --- Warm-up -------------------------------------------------------------------------------------
/** Registers what warms a site, a path such as `/` or `/shop`: after boot, and when this machine
 *  asks for `/@@warmup` or `/shop/@@warmup`. A site registered again is replaced. Throws a
 *  `TypeError` for what is no path or no function. */
export function registerWarmup(site: string, performer: WarmupPerformer): void {
  must(typeof site === 'string' && /^\/(?![/\\])[^\s?#]*$/.test(site), 'a site is / or /a/path')
  must(typeof performer === 'function', 'a warm-up performer is a function')
  performers.set(new URL(site, 'http://localhost').pathname.replace(/\/+$/, '') || '/', performer)
}
const allSites = (): string[] => performers.size > 0 ? [...performers.keys()] : ['/']

/** Joins a run that covers these sites, or queues one. Resolves to why they failed, '' if not. */
function warmUp(sites: string[]): Promise<string> {
  const covering = state.runs.find((run) => sites.every((site) => run.sites.includes(site)))
  if (covering) return covering.done
  const controller = new AbortController()
  const done = perform(sites, controller)
  state.runs.push({ sites, controller, done })
  return done
}
async function perform(sites: string[], controller: AbortController): Promise<string> {
  const [starting, { signal }] = [state, controller]
  const aborted = new Promise((go) => signal.addEventListener('abort', go))
  await starting.runs.at(-1)?.done
  const expire = () => controller.abort(new Error(`no end after ${WARMUP_MS / 60_000} minutes`))
  starting.due.set(expire, starting.clock + WARMUP_MS)
  if (!signal.aborted) log('info', `warms up ${sites.join(', ')}`)
  for (const [index, site] of sites.entries()) {
    const [startedAt, url] = [performance.now(), `${starting.instance?.url}${site}`]
    const performer = performers.get(site) ?? loadPage
    const work = async () => signal.aborted || performer({ site, url, signal })
    const reason = await Promise.race([work(), aborted]) // it may not heed the signal
      .then(() => signal.throwIfAborted()).then(() => '', wording)
    starting.tried.set(site, reason && site !== '/' ? `${site}: ${reason}` : reason)
    const seconds = ((performance.now() - startedAt) / 1_000).toFixed(1)
    const text = `${site} ${reason ? `failed (${reason})` : 'is warm'} after ${seconds} s`
    if (starting === state) log(reason ? 'warn' : 'info', `(${index + 1}/${sites.length}) ${text}`)
  }
  starting.due.delete(expire) // else what outlives the warm-up would end by its signal
  starting.runs.shift()
  const failure = failureOf(sites, starting)
  if (!failure && allSites().every((site) => sites.includes(site))) starting.warmup = 'done'
  return failure
}
const failureOf = (sites: string[], { tried } = state): string =>
  sites.map((site) => tried.get(site)).filter(Boolean).join('; ')
function abort(reason: string, { view, runs }: Pick<State, 'view' | 'runs'> = state): void {
  for (const { controller } of [view, ...runs]) controller.abort(new Error(reason))
}

const TOKEN = 'x-ftw-monitor-token'
/** After boot, until it succeeds: one passing error must not keep an instance out for good. The
 *  view begins, as then performers run as a request's work does. No answer proves that it is there,
 *  since a catch-all route, another worker or the old process give one too; our token does. */
async function warmUpAutomatically(): Promise<void> {
  const starting = state
  const { instance, tried, view: { token, controller: { signal } } } = state
  later(VIEW_MS, () => state.view.isAsked || state.view.controller.abort())
  const options = { headers: { [TOKEN]: token }, redirect: 'manual', signal } as const
  const askView = async () => (await fetch(`${instance?.url}/@@warmup`, options)).body?.cancel()
  if (!instance?.path) await askView().catch(quiet) // fetch knows no Unix sockets
  let pauseMs = WARMUP_RETRY_MS
  while (starting === state && state.warmup !== 'done') {
    while (isShuttingDown()) await new Promise<void>((go) => later(TICK_MS, go)) // or until stop()
    const untried = allSites().filter((site) => !tried.has(site)) // or registered meanwhile
    const failure = failureOf(allSites())
    if (untried.length > 0) await warmUp(untried) // which the view may have begun
    else Object.assign(state, { warmup: failure ? 'failed' : 'done', failure })
    if (untried.length > 0 || !failure) continue
    log('warn', `tries again in ${pauseMs / 1_000} s what failed to warm up: ${failure}`)
    await new Promise<void>((go) => later(pauseMs, go))
    for (const [site, reason] of tried) if (reason) tried.delete(site)
    pauseMs = Math.min(pauseMs * 2, WARMUP_RETRY_MAX_MS)
  }
}
/** The default performer: loads the page that the first visitor would have waited for. */
async function loadPage({ site, url, signal }: Parameters<WarmupPerformer>[0]): Promise<void> {
  const status = await visit(url, signal)
  if (status >= 500) throw new Error(`it answered ${status}`)
  if (status >= 300) log('warn', `got ${status} for ${site}: nothing behind it was loaded`)
}
/** The status of a page, when all of it has come; by node:http where that can be, as fetch refuses
 *  some ports, goes through proxies, and gives up after 300 s. */
async function visit(url: string, signal: AbortSignal): Promise<number> {
  if (/^https:/i.test(url)) {
    const { status, body } = await fetch(url, { redirect: 'manual', signal })
    await body?.pipeTo(new WritableStream())
    return status
  }
  return new Promise((resolve, reject) => {
    http.get(url, { agent: false, signal, socketPath: state.instance?.path }, (page) => {
      page.on('error', reject).on('end', () => resolve(page.statusCode ?? 0)).resume()
    }).on('error', reject)
      .on('upgrade', (page) => reject(new Error(`it answered ${page.destroy().statusCode}`)))
  })
}

/** Answers `GET /@@warmup` and `GET /SITE/@@warmup` of this machine when the warm-up is over: 200
 *  `Warmup successful` or 500 `Warmup failed: REASON`. It is there by itself where `start` has the
 *  server; else mount it: `app.use(warmupView)` in Express and Connect, `http.createServer((req,
 *  res) => warmupView(req, res, () => …))`. Other requests go to `next`, or are answered 404. */
export function warmupView(request: http.IncomingMessage, response: http.ServerResponse,
  next?: () => void): void {
  const { url = '', originalUrl = url } = request as { url?: string, originalUrl?: string }
  const site = warmupSite(originalUrl) // Express cuts url
  const answer = (status: number, text: string) => {
    closeAfter(response)
    response.writeHead(status, { 'Content-Type': PLAIN })
    response.end(text)
  }
  if (site === undefined) return next ? next() : answer(404, 'Not found')
  const isOurs = request.headers[TOKEN] === state.view.token
  const isHere = !(TOKEN in request.headers) && isLocal(request.socket) && !isForwarded(request)
  if (!isOurs && !isHere) return answer(403, 'Only this machine may ask for a warm-up')
  if (request.method !== 'GET') return answer(405, 'A warm-up is asked for by GET')
  if (!state.instance) return answer(503, 'The monitor is not started')
  const sites = allSites().filter((each) => isOurs || /^\/?$/.test(site) || site === each)
  if (sites.length === 0) return answer(404, 'No such site is registered')
  state.view.isAsked ||= isOurs
  warmUp(sites).then((failure) => failure ? answer(500, red(`Warmup failed: ${failure}`))
    : answer(200, 'Warmup successful')).catch(quiet) // the application may have answered meanwhile
}
/** `/shop` for `/shop/@@warmup?now`, '' for all; undefined where the view is not meant. */
const warmupSite = (url: string): string | undefined => /^([^?]*)\/@@warmup(?:\?|$)/.exec(url)?.[1]
const isLocal = ({ remoteAddress: peer, localAddress }: net.Socket): boolean =>
  peer !== undefined && (peer === localAddress || /^((::ffff:)?127\.|::1$)/.test(peer))
/** Behind a proxy everybody looks local; so do browsers here that show a stranger's page. */
const isForwarded = ({ headers }: http.IncomingMessage): boolean => // some only say Mozilla
  (headers['sec-fetch-site'] ?? headers['user-agent']?.match(/^Mozilla\//) ?? 'none') !== 'none' ||
  /,(forwarded|x-forwarded-[^,]*|x-real-ip|via|origin),/.test(`,${Object.keys(headers)},`)

// --- Draining ------------------------------------------------------------------------------------
/** Takes the instance out: every verdict is the reason; requests are served with `Connection:
 *  close`. Resolves when each prober was told `fall` times and no request is in flight, after
 *  `timeoutMs` at most, at once without a monitor; rejects with a `TypeError` or `RangeError`. */
export async function drain(options?: DrainOptions): Promise<void> { await untilDrained(options) }
/** Takes the instance in again. */
export function resume(): void { state.draining = undefined }

/** Drains, reports each change of what it waits for, and gives the outcome. */
async function untilDrained(options: DrainOptions = {}, tell: (text: string) => void = quiet) {
  const { reason = 'Draining', fall = 3, timeoutMs = 25_000 } = options
  must(typeof reason === 'string' && clean(reason).trim(), 'reason must be text')
  must(Number.isInteger(fall) && fall > 0, 'fall must be a whole number from 1', RangeError)
  must(timeoutMs >= 0, 'timeoutMs must be a number from 0', RangeError)
  if (!state.ticker) return 'Drained'
  const waitFor = state.draining?.waitFor ?? [...state.probers.values()]
    .filter(({ askedAt }) => state.clock - (askedAt.at(-PROBER_ASKS) ?? -Infinity) <= PROBER_MS)
    .map((prober) => Object.assign(prober, { told: 0 }))
  state.draining = { reason, waitFor }
  const last = new Map(Array.from(state.inFlight, ([response, { socket }]) => [socket, response]))
  for (const response of last.values()) closeAfter(response) // the last of those pipelined
  const startedAt = performance.now()
  for (let said = '', seen = -1, quietSince = startedAt; state.draining?.waitFor === waitFor;) {
    const { served: { requests }, inFlight: { size }, options: { server } } = state
    const know = waitFor.filter(({ told }) => told >= fall).length
    const progress = `${know} of ${waitFor.length} probers know` +
      (server ? `, ${size} requests in flight` : '')
    if (progress !== said) tell(`Draining: ${said = progress}`)
    const now = performance.now()
    if (know < waitFor.length || size > 0 || requests !== seen) [quietSince, seen] = [now, requests]
    if (now - quietSince >= QUIET_MS) return 'Drained'
    if (now - startedAt >= timeoutMs) return `Not drained after ${timeoutMs / 1_000} s: ${progress}`
    await new Promise((resolve) => setTimeout(resolve, DRAIN_POLL_MS).unref())
  }
  return 'Not drained: resumed meanwhile'
}
/** A keep-alive client goes elsewhere next time. HTTP/2 has no such header, but says GOAWAY. */
function closeAfter(response: http.ServerResponse): void {
  const { stream } = response as { stream?: { session?: { close(): void } } }
  if (stream || response.headersSent !== false) return stream?.session?.close()
  response.setHeader('Connection', 'close') // and a gateway's upstream may not say otherwise
  for (const method of ['setHeader', 'appendHeader', 'removeHeader'] as const) {
    const inner = response[method] as (...all: string[]) => never
    response[method] = (...all: string[]): never =>
      /^connection$/i.test(`${all[0]}`) ? response as never : Reflect.apply(inner, response, all)
  }
}
/** Remembers who asks, and how often who asked was told that the instance drains. */
function noteProber(asker: Asker, worth: number): void {
  if ('mode' in asker && asker.mode === 'interactive') return // people do, and `ftw-monitor wait`
  const { probers, draining, clock } = state
  const isFlood = !draining && ++state.lookups > LOOKUPS_PER_TICK
  const address = isFlood ? 'whoever' : asker.remoteAddress ?? state.endpoint.path
  if (address === undefined) return
  const prober = probers.get(address) ?? { askedAt: [], told: 0 }
  prober.told += worth
  prober.askedAt = [...prober.askedAt.slice(1 - PROBER_ASKS), clock]
  if (draining) return // nobody who is waited for is to make room
  probers.delete(address)
  probers.set(address, prober)
  if (probers.size > PROBERS_MAX) probers.delete(probers.keys().next().value ?? '')
}

// --- Commands ------------------------------------------------------------------------------------
/** Adds a command, or replaces it. The first line of `doc` is what `help` lists. Throws a
 *  `TypeError` for a name that is empty or has white space in it, and for wrong options. */
export function register(name: string, doc: string, command: Command,
  { http = false, local = false }: CommandOptions = {}): void {
  must(isWord(name), 'a command has a name without white space')
  must(typeof doc === 'string' && typeof command === 'function', 'doc is text, command a function')
  must(!http || !local, 'a command is http or local: a browser here is local to all pages it shows')
  commands.set(name, { doc, command, http, local, type: commands.get(name)?.type })
}
const isWord = (name: unknown): boolean => typeof name === 'string' && /^[^\s\p{C}]+$/u.test(name)
/** Registers a command that gives the text that it has to say, after which `mode` follows. */
const report = (
  name: string, doc: string, command: Entry['command'], how: Partial<Entry> = { http: true }
) => commands.set(name, { doc, command, isReport: true, ...how })
type Asker = Session | Exchange // its `refuse` says what went wrong, with a status for HTTP
/** What the asker, or the environment, did wrong: told in these words, without a stack. */
class Refusal extends Error {}
const refuse = (text: string): never => { throw new Refusal(text) }

/** The one way to run a command: whatever goes wrong becomes a line for the asker. */
function run(name: string, args: string[], asker: Asker): Mode | void | Promise<Mode | void> {
  const entry = commands.get(name)
  if (!entry || (asker instanceof Exchange && !entry.http)) return refuseUnknown(name, asker)
  if (entry.local && !asker.local) return asker.refuse(`${name} is for this machine only\n`, 403)
  try {
    const answer = entry.command(asker, ...args)
    if (!isObject(answer)) return finish(name, entry, answer, asker)
    return Promise.resolve(answer).then((settled) => finish(name, entry, settled, asker))
      .catch((error: unknown) => refuseFailed(name, entry, error, asker))
  } catch (error) { refuseFailed(name, entry, error, asker) }
}
function finish(name: string, entry: Entry, answer: unknown, asker: Asker): Mode | void {
  if (entry.isReport && answer !== undefined) asker.write(`${answer}\n`)
  if (entry.isReport) return entry.mode
  if (MODES.includes(answer)) return answer as Mode | void
  refuse(`${name} returned ${wording(answer)} instead of a mode; reply with connection.write`)
}
const MODES: unknown[] = ['quit', 'interactive', 'more', undefined]
const refuseUnknown = (name: string, asker: Asker): void =>
  asker.refuse(`${red(`Invalid command '${name}'`)}\nTry "help".\n`, 404)
/** The asker gets one line; the frames, which tell of the host's files, go to the log. */
function refuseFailed(name: string, entry: Entry, error: unknown, asker: Asker): void {
  const isRefusal = attempt(() => error instanceof Refusal)
  const kind = attempt(() => error instanceof Error && String(error.name)) || 'Error'
  const line = isRefusal ? wording(error) : `${kind}: ${wording(error)}`
  asker.refuse(`${red(line)}\n`, 500)
  const now = performance.now()
  if (isRefusal || now - (entry.loggedAt ?? -Infinity) < LOG_MS) return
  entry.loggedAt = now
  log('error', `got ${line} from ${name}`, ...attempt(() => framesOf(error as Error)) ?? [])
}
/** Without the message, which may come from outside and look like a frame. */
const framesOf = ({ message, stack = '' }: Error): string[] =>
  `${stack}`.split(`${message}`).slice(1).join(`${message}`).match(/(?<=\n) +at [^\n]*/g) ?? []

report('help', `Get help about server commands\n
    help lists the commands, help NAME shows what is written about one.
`, (asker, name) => {
  const entry = commands.get(name ?? '')
  if (entry) return `Help for ${name}:\n\n${entry.doc || '?'}`
  if (name !== undefined) return refuseUnknown(name, asker)
  const all = [...commands].map(([word, { doc }]) => `\n  ${word} -- ${doc.split('\n')[0] || '?'}`)
  return `Supported commands:${all.sort().join('')}`
})
report('interactive', "Turn on monitor's interactive mode",
  () => 'Interactive mode on.  Use "quit" To exit.', { mode: 'interactive' })
report('quit', 'Quit the monitor', () => 'Goodbye.', { mode: 'quit' })
report('health_check', 'Check whether the instance is alive and ready to serve requests.',
  (asker) => verdict(asker))
report('agent_check', "Answer HAProxy's agent check", async (asker) => {
  const reason = await verdict(asker, Infinity)
  if (reason !== 'OK') return `${state.draining ? 'stopped' : 'down'} #${reason}`
  const idle = Math.round(100 - 100 * Math.max(0, state.load))
  return `up ${Math.max(10, idle)}%` // who fails fast is idle, too
})
report('warmup_state', 'Get instance warmup state.',
  () => state.runs.length > 0 ? '0 1' : state.warmup === 'done' ? '1 0' : '0 0')
report('drain', 'Take the instance out: drain [REASON...]', (asker, ...words) => untilDrained(
  words.length > 0 ? { reason: words.join(' ') } : {}, (text) => asker.write(`${text}\n`)
), { local: true })
report('resume', 'Take the instance into service again', () => {
  resume()
  return 'Resumed'
}, { local: true })

// --- Figures -------------------------------------------------------------------------------------
/** Counts events, and remembers an hour of them by the second. */
class Counter {
  total = 0
  #counts = new Map<number, number>() // by the second, the oldest first
  add = (count = 1): void => {
    must(count >= 0 && count < Infinity, 'a count must be a number from 0', RangeError)
    const second = Math.floor(performance.now() / 1_000)
    this.#counts.set(second, (this.#counts.get(second) ?? 0) + Number(count))
    if (this.#counts.size > HISTORY_SECONDS) this.#counts.delete(this.#counts.keys().next().value!)
    this.total += Number(count) // JavaScript may say '3', which is not to be appended
  }
  last(seconds: number): number {
    const now = Math.floor(performance.now() / 1_000)
    return [...this.#counts].reduce((sum, [at, count]) => now - at < seconds ? sum + count : sum, 0)
  }
}

/** Registers a database, or replaces it, and gives the counters on which the service tells what it
 *  does with it. Throws a `TypeError` for a name with white space, and for what is no method. */
export function registerDatabase(name: string, database: Database): Activity {
  const { isConnected, connections: list = quiet, figures = quiet } = Object(database)
  must(isWord(name), 'a database has a name without white space')
  must([isConnected, list, figures].every((method) => typeof method === 'function'),
    'a database has isConnected(), and may have connections() and figures()')
  const [loads, stores, connections] = [new Counter(), new Counter(), new Counter()]
  databases.set(name, { name, database, counters: { loads, stores, connections }, asked: {} })
  return { loads: loads.add, stores: stores.add, connections: connections.add }
}

/** The database that is meant; `-` and nothing mean `main`, else the first one. */
const named = (name = '-'): Registered => databases.get(name) ??
  (name === '-' ? databases.get('main') ?? [...databases.values()][0] : undefined) ??
  refuse(`Error: no database '${name === '-' ? 'main' : name}' is registered`)
const toNumber = (text: string, name: string, max: number): number =>
  /^\d+(\.\d+)?$/.test(text) && Number(text) <= max ? Number(text)
    : refuse(`Error: ${name} must be a number from 0 to ${max}`)
type Figure = keyof Activity | keyof Figures
/** What was counted in the last seconds, and integers that the database gives; -1 for neither. */
async function gather(registered: Registered | undefined, text: string, ...names: Figure[]) {
  const seconds = toNumber(text, 'SECONDS', HISTORY_SECONDS)
  const counters: Partial<Record<string, Counter>> = registered?.counters ?? {}
  const figures: Record<string, unknown> = Object(registered && await ask(registered, 'figures'))
  const integer = (value: unknown) => Number.isFinite(value) ? Math.trunc(Number(value)) : -1
  return names.map((name) => counters[name]?.last(seconds) ?? integer(figures[name]))
}

report('dbinfo', `Get database statistics\n
    dbinfo [DATABASE] [SECONDS=300]: loads, stores and connections in the last SECONDS, objects in
    the caches, and those of them that are loaded. "-" is the main database.
`, async (_, name, seconds = '300') => (await gather(named(name), seconds,
  'loads', 'stores', 'connections', 'size', 'nonGhost')).join(' '))
report('zeocache', `Get ZEO client cache statistics\n
    zeocache [DATABASE]: records added, bytes added, records evicted, bytes evicted, accesses.
`, async (_, name) => (await gather(named(name), '0',
  'recordsAdded', 'bytesAdded', 'recordsEvicted', 'bytesEvicted', 'accesses')).join(' '))
report('zeostatus', 'Get ZEO client status information', async (_, name) =>
  await trouble(named(name)) === '' ? 'True' : 'False')
report('monitor', `Get general process info\n
    monitor [AGE=100] [DATABASE]: how many requests are in flight, or connections of a database are
    open; the memory; and, on this machine, those that are older than AGE seconds (0: all).
`, async (asker, age = '100', name) => {
  const least = toNumber(age, 'AGE', Number.MAX_SAFE_INTEGER)
  const open = name === undefined ? requestAges() : agesOf(await ask(named(name), 'connections'))
  const lines = open?.filter(([seconds]) => asker.local && (!least || seconds > least))
    .sort(([one], [other]) => one - other)
    .map(([seconds, info]) => `\n${seconds.toFixed(1)} ${clean(info)}`) ?? []
  const rss = String(Math.round(process.memoryUsage.rss() / 1_024)).padStart(8)
  return `${open?.length ?? -1}\nVmRSS:\t${rss} kB${lines.join('')}`
})
/** Ages in seconds, and lines without their query strings, which carry secrets. */
const requestAges = (): [number, string][] | undefined => state.options.server &&
  Array.from(state.inFlight.values(), ({ startedAt, line }) =>
    [(performance.now() - startedAt) / 1_000, line.split('?')[0] ?? ''])
const agesOf = (open: unknown): [number, string][] | undefined => Array.isArray(open)
  ? open.map(Object).map(({ openedAt, info }: OpenConnection) =>
    [(Date.now() - Number(openedAt)) / 1_000 || 0, wording(info)]) : undefined

/** Once a tick, so that several probers get the same answer and none spoils another's. */
function measureLoad(): void {
  const { eventLoopUtilization: measure = () => ({}) } = Object(performance) // not typed
  const now = measure()
  if (!now.active) return // it is missing on Bun, and always 0 on Deno
  state.loads = [...state.loads.slice(-LOAD_SAMPLES), now]
  state.load = measure(now, state.loads[0]).utilization || 0
}
/** Without a server given, nothing is known of requests. */
const httpState = () => state.options.server ? { in_flight: state.inFlight.size, ...state.served }
  : { in_flight: -1, requests: -1, errors: -1 }

report('perf_metrics', `Get performance related metrics\n
    perf_metrics [DATABASE] [SECONDS=300]: one line of JSON, with -1 for what cannot be had.
`, async (_, name = '-', seconds = '300') => {
  const registered = databases.size > 0 || name !== '-' ? named(name) : undefined
  const error = registered && await trouble(registered)
  if (error) return JSON.stringify({ error: red(error) })
  const [loads, stores, connections, size, ngsize, max_size, conflicts, unresolved_conflicts,
    total_objs, size_in_bytes] = await gather(registered, seconds, 'loads', 'stores', 'connections',
    'size', 'nonGhost', 'maxSize', 'conflicts', 'unresolvedConflicts', 'objects', 'bytes')
  const { rss, heapUsed: heap_used, heapTotal: heap_total, external, arrayBuffers: array_buffers } =
    process.memoryUsage()
  return JSON.stringify({
    instance: { uptime: Math.floor(process.uptime()), pid: process.pid, version: process.version },
    cache: { size, ngsize, max_size },
    db: { loads, stores, connections, conflicts, unresolved_conflicts, total_objs, size_in_bytes },
    memory: { rss, uss: -1, pss: -1, heap_used, heap_total, external, array_buffers },
    cpu: process.cpuUsage(), loop: { utilization: Number(state.load.toFixed(4)) }, http: httpState()
  })
}, { http: true, type: 'application/json' })
report('metrics', 'Get metrics for Prometheus, in its text exposition format', async () => {
  const all = [...databases.values()]
  const troubles = await Promise.all(all.map(trouble))
  const connected = troubles.map((text) => Number(text === ''))
  const healthy = Number(judge(troubles.find(Boolean)) === 'OK')
  const { user, system } = process.cpuUsage()
  const { rss, heapUsed, heapTotal, external } = process.memoryUsage()
  const { in_flight, requests, errors } = httpState()
  const labels = all.map(({ name }) => `{database=${JSON.stringify(name)}}`)
  const families: [name: string, help: string, values: number[], labels?: string[]][] = [
    ['process_cpu_user_seconds_total', 'CPU time in user mode.', [user / 1e6]],
    ['process_cpu_system_seconds_total', 'CPU time in the kernel.', [system / 1e6]],
    ['process_cpu_seconds_total', 'CPU time.', [(user + system) / 1e6]],
    ['process_start_time_seconds', 'Start, since 1970.', [performance.timeOrigin / 1e3]],
    ['process_resident_memory_bytes', 'Resident memory.', [rss]],
    ['nodejs_heap_size_total_bytes', 'Size of the heap.', [heapTotal]],
    ['nodejs_heap_size_used_bytes', 'Used part of the heap.', [heapUsed]],
    ['nodejs_external_memory_bytes', 'Memory outside the heap.', [external]],
    ['nodejs_eventloop_utilization', 'Busy part of the last ten seconds.', [state.load]],
    ['nodejs_version_info', 'Version of Node.js.', [1], [`{version="${process.version}"}`]],
    ['ftw_monitor_healthy', 'Whether it may be sent requests.', [healthy]],
    ['ftw_monitor_warmup_done', 'Whether it is warm.', [Number(state.warmup === 'done')]],
    ['ftw_monitor_http_requests_total', 'Requests so far.', [requests]],
    ['ftw_monitor_http_requests_in_flight', 'Requests in flight.', [in_flight]],
    ['ftw_monitor_http_errors_total', 'Answers of 500 and more.', [errors]],
    ['ftw_monitor_database_connected', 'Whether it is connected.', connected, labels]
  ]
  for (const kind of ['loads', 'stores', 'connections'] as const) families.push([
    `ftw_monitor_database_${kind}_total`, `What the service counted as ${kind}.`,
    all.map(({ counters }) => counters[kind].total), labels])
  return families.filter(([, , [first = -1]]) => first >= 0) // else it cannot be had
    .flatMap(([name, help, values, labels = ['']]) => [`# HELP ${name} ${help}`,
      `# TYPE ${name} ${name.endsWith('_total') ? 'counter' : 'gauge'}`,
      ...values.map((value, index) => `${name}${labels[index]} ${value}`)]).join('\n')
}, { http: true, type: 'text/plain; version=0.0.4; charset=utf-8' })

// --- The wire: lines -----------------------------------------------------------------------------
const SESSION = Symbol('session')
type Wire = net.Socket & { [SESSION]?: Session }
function openSession(socket: Wire): void {
  const session = socket[SESSION] = new Session(socket)
  const free = state.sessions.indexOf(undefined)
  session.place = free < 0 ? makeRoom() : free
  state.sessions[session.place] = session
  socket.unref().on('error', quiet) // HAProxy resets every check
  socket.on('data', receive).on('end', halfClose).on('close', forget)
}
// The same functions for all sockets: closures for each would cost more than the rest of this
function receive(this: Wire, chunk: Buffer): void { this[SESSION]?.receive(chunk) }
function halfClose(this: Wire): void { this[SESSION]?.serve() }
function forget(this: Wire): void {
  const place = this[SESSION]?.place ?? -1 // another's, after makeRoom() or a stop()
  if (state.sessions[place]?.socket === this) state.sessions[place] = undefined
}
/** Whoever holds most makes room: what is idle longest, or else what is oldest. Gives its place. */
function makeRoom(): number {
  const sessions = state.sessions as Session[]
  const held = new Map<string | undefined, number>()
  for (const { remoteAddress: at } of sessions) held.set(at, (held.get(at) ?? 0) + 1)
  const most = Math.max(...held.values())
  const [leaving] = sessions.filter(({ remoteAddress }) => held.get(remoteAddress) === most).sort(
    (one, other) => idleSince(one) - idleSince(other) || one.openedAt - other.openedAt)
  leaving?.socket.destroy()
  return leaving?.place ?? 0
}
const idleSince = ({ running, since }: Session): number => running ? Infinity : since

/** One connection. It begins in quit mode: a command, its reply, the end. */
class Session {
  readonly socket: net.Socket
  place = -1 // among all sessions
  readonly openedAt = performance.now()
  mode: Mode | 'http' = 'quit'
  unread: Buffer = NOTHING
  last: string[] = [] // the words of the last command
  running = '' // what the next line waits for
  since = state.clock
  ending = false // by us
  exchange: Exchange | undefined // over HTTP
  constructor(socket: net.Socket) { this.socket = socket }
  get remoteAddress(): string | undefined { return this.socket.remoteAddress }
  get local(): boolean { return state.endpoint.path !== undefined || isLocal(this.socket) }

  write(text: string): void {
    if (this.ending || this.socket.destroyed) return
    this.socket.write(text)
    if (this.socket.writableLength > UNSENT_MAX) this.socket.destroy()
  }
  refuse(text: string): void { this.write(text) }
  end(): void {
    if (this.ending) return // a second end() would build an error with its stack
    this.ending = true
    this.since = state.clock
    this.socket.end()
  }

  receive(chunk: Buffer): void {
    if (this.ending) return
    this.unread = this.unread.length > 0 ? Buffer.concat([this.unread, chunk]) : chunk
    if (this.running && this.unread.length > LINE_MAX) this.socket.pause()
    this.serve()
  }
  /** Takes one line after the other, each when the reply to the one before is done and taken. */
  serve(): void {
    for (let turn = 0; !this.running && !this.ending; turn++) {
      const { unread, socket } = this
      if (turn === LINES_PER_TURN) return this.waitFor('its turn', setImmediate)
      if (socket.writableNeedDrain) return this.waitFor('reader', (go) => socket.once('drain', go))
      const feed = unread.indexOf(0x0a)
      const length = feed < 0 ? unread.length : feed
      const line = unread.toString('utf8', 0, length)
      if (this.last.length === 0 && isHttp(line, feed < 0)) return this.becomeHttp(unread)
      if (feed < 0 && length <= LINE_MAX && !socket.readableEnded) return void socket.resume()
      if (length > LINE_MAX) this.write('Line too long\n')
      if (length > LINE_MAX || unread.length === 0) return this.end()
      this.unread = length + 1 < unread.length ? unread.subarray(length + 1) : NOTHING
      this.execute(line.match(/\S+/g) ?? [])
    }
  }
  waitFor(what: string, event: (go: () => void) => unknown): void {
    this.running = what
    event(() => {
      this.running = ''
      this.serve()
    })
  }
  /** An empty line repeats the last command; in `more` mode every line is its arguments. */
  execute(words: string[]): void {
    if (this.mode !== 'more' && words.length > 0) this.last = words
    const [name, ...args] = this.last
    if (name === undefined) return
    this.since = state.clock
    const answer = run(name, this.mode === 'more' ? words : args, this)
    if (!(answer instanceof Promise)) return this.follow(answer)
    this.waitFor(name, (go) => answer.then((mode) => this.follow(mode)).then(go))
  }
  follow(mode: Mode | void): void {
    if (mode) this.mode = mode
    if (this.mode === 'quit') this.end()
    else this.socket.setNoDelay() // else replies to pipelined lines would wait for ACKs
  }
  becomeHttp(unread: Buffer): void {
    this.mode = 'http'
    this.socket.off('data', receive).off('end', halfClose).unshift(unread)
    httpServer.emit('connection', this.socket)
  }
  enforceLimits(): void {
    const { running, ending, mode, socket } = this
    const isOpen = mode === 'interactive' || mode === 'more'
    const limit = ending ? LINGER_MS : running ? COMMAND_MS : isOpen ? SILENCE_MS : SEND_MS
    if (state.clock - this.since < limit) return
    if (!running || ending || socket.writableNeedDrain) return void socket.destroy()
    const asker: Asker = this.exchange ?? this
    asker.refuse(`${red(`Error: ${running} timed out`)}\n`, 500)
    asker.end()
    this.end()
  }
}
const NOTHING = Buffer.alloc(0)
/** A request line, whatever its method, since a browser may send `drain / HTTP/1.1`; or the start
 *  of one that is too long for a command. Node.js is to judge it. */
const isHttp = (line: string, isPart: boolean): boolean => isPart
  ? line.length > LINE_MAX && /^[A-Z]+ \S/.test(line) : /\sHTTP\/\d\S*\s*$/i.test(line)

// --- The wire: HTTP ------------------------------------------------------------------------------
/** Never listens, but takes sockets over: so all time limits but `keepAliveTimeout` are ours. */
const httpServer = Object.assign(http.createServer(answerRequest), {
  maxRequestsPerSocket: REQUESTS_PER_CONNECTION, httpAllowHalfOpen: true // as `nc -N` does
}).on('dropRequest', (_, socket) => socket.destroy())
const PLAIN = 'text/plain; charset=utf-8'

function answerRequest(request: http.IncomingMessage, response: http.ServerResponse): void {
  const session = (request.socket as Wire)[SESSION]
  if (!session) return void response.destroy() // stopped meanwhile
  const [path = ''] = (request.url ?? '').split('?')
  const segments = attempt(() => path.split('/').filter(Boolean).map(decodeURIComponent))
  const [name = 'help', ...args] = segments ?? [path] // no command is called that
  const exchange = new Exchange({ session, response, name })
  const answer = /^(GET|HEAD)$/.test(request.method ?? '') ? run(name, args, exchange)
    : exchange.refuse('Only GET and HEAD are answered here\n', 405)
  if (!(answer instanceof Promise)) return exchange.end()
  Object.assign(session, { running: name, since: state.clock, exchange })
  void answer.then(() => exchange.end())
}

/** One request: the path names the command; the answer is sent when it is complete. */
class Exchange {
  declare readonly session: Session
  declare readonly response: http.ServerResponse
  declare readonly name: string
  status = 200
  body = ''
  constructor(of: Pick<Exchange, 'session' | 'response' | 'name'>) { Object.assign(this, of) }
  get remoteAddress(): string | undefined { return this.session.remoteAddress }
  get local(): boolean { return this.session.local && !isForwarded(this.response.req) }
  write(text: string): void {
    if (this.response.headersSent) return
    this.body += text
    if (this.body.length > UNSENT_MAX) this.session.socket.destroy()
  }
  refuse(text: string, status: number): void {
    this.write(text)
    this.status = status
  }
  end(): void {
    const { session, response, name, body } = this
    session.running = ''
    session.since = state.clock
    if (response.headersSent) return
    if (name === 'health_check' && this.status === 200 && body !== 'OK\n') this.status = 503
    response.writeHead(this.status, {
      'Content-Type': (this.status === 200 && commands.get(name)?.type) || PLAIN,
      'Content-Length': Buffer.byteLength(body), 'Cache-Control': 'no-store',
      'X-Content-Type-Options': 'nosniff', ...this.status === 405 && { Allow: 'GET, HEAD' }
    }).end(body)
  }
}

// --- The program; all from here on may be deleted, and nothing above refers to it ----------------
async function main(words: string[]): Promise<number> {
  if (words[0] === 'demo') return demo().then(() => 0)
  if (words[0] === 'dump-perf-metrics') return dumpPerfMetrics(words.slice(1))
  const monitor = findMonitor(takeOption(words, 'port'), takeOption(words, 'host'))
  if (words[0] === 'wait') return wait(monitor, Number(takeOption(words, 'timeout') ?? 300))
  if (words[0]?.startsWith('-')) refuse(`knows no ${words[0]}; try ftw-monitor help`)
  const line = words.join(' ').trim() || 'help'
  if (/[\r\n]/.test(line)) refuse('a command is one line')
  const [name] = line.split(/\s+/)
  const isJoined = name === 'interactive' // to the terminal
  const socket = net.connect(monitor)
  if (isJoined) process.stdin.pipe(socket.on('close', () => process.stdin.destroy()))
  const reply = await talk(socket, `${line}\n`, isJoined ? SILENCE_MS : COMMAND_MS, true)
  return name === 'health_check' && reply !== 'OK\n' ? 1 : 0
}
/** Takes `--name value` or `--name=value` out of the words. */
function takeOption(words: string[], name: string): string | undefined {
  const at = words.findIndex((word) => word.split('=')[0] === `--${name}`)
  if (at < 0) return undefined
  const option = words.splice(at, words[at]?.includes('=') ? 1 : 2).join('=')
  return option.includes('=') ? option.slice(name.length + 3) : refuse(`--${name} needs a value`)
}
/** Where the monitor listens: as the options say, else as the instance itself would find out. */
function findMonitor(port?: string, host?: string): net.NetConnectOpts {
  const told = (port === undefined && env('FTW_MONITOR_LISTEN', toEndpoint)) || {}
  if (told.path && host === undefined) return { path: told.path }
  const bound = host ?? told.host ?? env('HOST') ?? ''
  const its = port ?? env('PORT') ?? '8080'
  const own = told.port ?? toPort(`${Number(toPort(its)) + PORT_OFFSET}`)
  return { host: LOOPBACK.get(bound) ?? bound, port: own ?? refuse(`${its} is no instance port`) }
}

/** Gives the reply, for which there is this time; or, where it is shown, for each part of it. */
async function talk(socket: net.Socket, text: string, limitMs = 1_000, isShown = false) {
  const late = new Error(`no answer within ${limitMs / 1_000} s`)
  const timer = setTimeout(() => socket.destroy(late), limitMs).unref()
  socket.setEncoding('utf8').write(text)
  let reply = ''
  for await (const part of socket as AsyncIterable<string>) {
    reply = (reply + part).slice(0, UNSENT_MAX)
    if (isShown) process.stdout.write(part.replace(/[^\n\t]+/g, clean))
    if (isShown) timer.refresh()
  }
  return reply
}
/** Waits until the instance is healthy, and prints why it is not. */
async function wait(to: net.NetConnectOpts, timeoutSeconds: number): Promise<number> {
  if (!(timeoutSeconds >= 0)) refuse('--timeout needs a number of seconds')
  let said = ''
  do {
    if (said) await new Promise((resolve) => setTimeout(resolve, TICK_MS))
    const reply = await talk(net.connect(to), 'interactive\nhealth_check\nquit\n') // see noteProber
      .catch((error: unknown) => `\n${wording(error)}`)
    const reason = clean(reply.split('\n')[1] || 'no answer')
    if (reason !== said) console.log(`${process.uptime().toFixed(1)} s  ${said = reason}`)
  } while (said !== 'OK' && process.uptime() <= timeoutSeconds)
  return said === 'OK' ? 0 : 1
}

/** Prints the figures of many instances in InfluxDB's line protocol, as ftw.monitor does. */
async function dumpPerfMetrics(words: string[]): Promise<number> {
  const fleet = escaped(takeOption(words, 'deployment') ?? process.cwd().replace(/.*[/\\]/, ''))
  const toLine = async (instance: string): Promise<string> => {
    const [, name = instance, at = ''] = /^(?:([^=]+)=)?([^]*)$/.exec(instance) ?? []
    const { host = 'localhost', port = at } = toEndpoint(at) ?? {}
    const json = await talk(net.connect(findMonitor(`${port}`, host)), 'perf_metrics\n')
    return `deployments,deployment=${fleet},process=${escaped(name)} ${toFields(json)}\n`
  }
  const lines = await Promise.all(words.map((instance) =>
    toLine(instance).catch((error: unknown) => complain(`${instance}: ${wording(error)}`))))
  process.stdout.write(lines.sort().join(''))
  return lines.some(Boolean) ? 0 : 1
}
const complain = (error: unknown): void => console.error(`ftw-monitor: ${clean(wording(error))}`)
/** `{ group: { name: value } }` as `group.name=value`, sorted; only numbers and text count. */
function toFields(json: string): string {
  const figures = JSON.parse(json, (_, value) => typeof value === 'string' ? clean(value) : value)
  const { error = 'no figures', ...groups }: Record<string, unknown> = Object(figures)
  const fields = Object.entries(groups).flatMap(([group, values]) =>
    Object.entries(isObject(values) ? values : {})
      .filter(([, value]) => typeof value === 'string' || Number.isFinite(value))
      .map(([name, value]) => `${escaped(`${group}.${name}`)}=${JSON.stringify(value)}`))
  return fields.sort().join(',') || refuse(wording(error))
}
const escaped = (text: string): string =>
  clean(text).replace(/\\+$/, '').replace(/[,= ]/g, '\\$&') || 'unnamed'

/** A small instance to try everything on. */
function demo(): Promise<unknown> {
  const { loads } = registerDatabase('main', { isConnected: () => true })
  registerWarmup('/', () => new Promise((resolve) => setTimeout(resolve, 3_000).unref()))
  const server = http.createServer((_, response) => {
    loads()
    response.end('Hello from the demo of ftw-monitor\n')
  })
  process.once('SIGTERM', () => drain().then(() => server.close()))
  server.on('error', complain).listen(Number(env('PORT') ?? 8080), env('HOST'))
  return start(server)
}

// Node.js 20 has no `import.meta.main`; there an installed program is called by a link to it
const called = `file:${process.argv[1]?.replace(/[%?#\s]/g, encodeURIComponent)}`
if (/\/monitor\.[jt]s$/.test(import.meta.url) && // else part of somebody's bundle
  (import.meta.main ?? import.meta.resolve(called) === import.meta.url)) {
  process.exitCode = 2 // until main() tells better
  process.stdout.on('error', quiet) // `| head -1`
  main(process.argv.slice(2)).then((status) => { process.exitCode = status }, complain)
}
