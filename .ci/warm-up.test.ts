// The suites of monitor.test.ts from the warm-up to the wire, for `npm test`, which runs all parts together.
process.env['TEST_PART'] = 'warm-up'
await import('../monitor.test.ts')
