// The suites of monitor.test.ts that start processes, for `npm test`, which runs all parts together.
process.env['TEST_PART'] = 'processes'
await import('../monitor.test.ts')
