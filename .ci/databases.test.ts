// The suites of monitor.test.ts up to the databases, for `npm test`, which runs all parts together.
process.env['TEST_PART'] = 'databases'
await import('../monitor.test.ts')
