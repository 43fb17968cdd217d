// Perfetto's trace processor as ui.perfetto.dev runs it, on standard input and output instead of a page:
//
//     node perfetto_host.js FOLDER
//
// FOLDER has `engine_bundle.js` and `trace_processor.wasm` of a build of Perfetto's page. Used by check_trace.py.

const fs = require('fs');
const path = require('path');
const vm = require('vm');

const { stdin, stdout, argv, exit } = process;
const folder = argv[2];
const file = (url) => fs.readFileSync(path.join(folder, path.basename(url)));
const say = (...words) => fs.writeSync(2, words.join(' ') + '\n');

// What the bundle expects of a browser's worker. It refuses what looks like Node.
delete globalThis.process;
// Only its allocator's notes about a system call that a browser has not.
const quiet = (...words) => String(words[0]).includes('unsupported syscall') || say(...words);
console.log = console.warn = console.error = console.info = console.debug = quiet;
globalThis.self = globalThis;
globalThis.location = { href: `file://${folder}/engine_bundle.js` };
globalThis.WorkerGlobalScope = Object;
globalThis.XMLHttpRequest = class {
  open(_method, url) { this.url = url; }
  send() { this.response = file(this.url); }
};
vm.runInThisContext(file('engine_bundle.js').toString());

const port = { postMessage: (bytes) => stdout.write(bytes) };
// Once what it has begun is over, it is ready.
setImmediate(() => {
  globalThis.onmessage({ data: port });
  stdin.on('data', (bytes) => port.onmessage({ data: new Uint8Array(bytes) }));
  stdin.on('end', () => exit(0));
});
