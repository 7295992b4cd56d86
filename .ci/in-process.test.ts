// The suites of monitor.test.ts up to the wire, for `npm test`, which runs both parts together.
process.env['TEST_PART'] = 'in process'
await import('../monitor.test.ts')
