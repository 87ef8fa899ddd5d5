// Runs the golden files beside it with onnxruntime-web (WebAssembly) under node: npm install onnxruntime-web, and then
// node check.mjs. Prints each name and its largest difference, and ends with 1 if one is too large.
import { readdirSync, readFileSync, existsSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import * as ort from "onnxruntime-web";

const RTOL = 1e-4, ATOL = 1e-5;
const TYPES = { 1: "float32", 7: "int64" };

// The fields of a TensorProto that numpy_helper writes: dims 1, data_type 2, name 8, raw_data 9.
function tensor(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0n, shift = 0n, byte;
    do {
      byte = bytes[at++];
      value |= BigInt(byte & 127) << shift;
      shift += 7n;
    } while (byte & 128);
    return Number(value);
  };
  const found = { dims: [], name: "", raw: new Uint8Array() };
  while (at < bytes.length) {
    const key = varint(), field = key >> 3;
    if ((key & 7) === 0) {
      const value = varint();
      if (field === 1) found.dims.push(value);
      if (field === 2) found.type = TYPES[value];
      continue;
    }
    const length = varint(), part = bytes.slice(at, at + length);
    if (field === 1) {
      const end = at + length;
      while (at < end) found.dims.push(varint());
    } else at += length;
    if (field === 8) found.name = new TextDecoder().decode(part);
    if (field === 9) found.raw = part;
  }
  const kind = found.type === "int64" ? BigInt64Array : Float32Array;
  const data = new kind(found.raw.buffer, found.raw.byteOffset, found.raw.length / kind.BYTES_PER_ELEMENT);
  return [found.name, new ort.Tensor(found.type, data, found.dims)];
}

function tensors(folder, kind) {
  const found = [];
  for (let i = 0; existsSync(join(folder, `${kind}_${i}.pb`)); i++)
    found.push(tensor(new Uint8Array(readFileSync(join(folder, `${kind}_${i}.pb`)))));
  return Object.fromEntries(found);
}

ort.env.wasm.numThreads = 1;
const here = dirname(fileURLToPath(import.meta.url));
let failed = 0, count = 0;
for (const name of readdirSync(here).sort()) {
  const file = join(here, name, "model.onnx"), data = join(here, name, "test_data_set_0");
  if (!existsSync(file)) continue;
  count++;
  const session = await ort.InferenceSession.create(new Uint8Array(readFileSync(file)));
  const expected = tensors(data, "output");
  const found = await session.run(tensors(data, "input"));
  let off = 0, passed = true;
  for (const [output, wanted] of Object.entries(expected)) {
    const got = found[output];
    passed &&= String(got.dims) === String(wanted.dims);
    const largest = wanted.data.reduce((a, b) => Math.max(a, Math.abs(b)), 1);
    wanted.data.forEach((value, i) => {
      const difference = Math.abs(got.data[i] - value);
      passed &&= difference <= ATOL * largest + RTOL * Math.abs(value);
      off = Math.max(off, difference);
    });
  }
  failed += !passed;
  console.log(name.padEnd(20), off.toExponential(1), passed ? "" : "FAILED");
}
console.log(`onnxruntime-web ${ort.env.versions?.web ?? ""}: ${count} models, ${failed} failed`);
process.exit(failed || !count ? 1 : 0);
