// Classify PNG pictures with an exported network in Node: npm install onnxruntime-node pngjs
//
//     node classify.mjs model.onnx picture.png ... [--budget 0.5]
//
// One line of JSON for each picture. Pictures must have the size that the network was made for.
import { readFileSync } from "node:fs";
import ort from "onnxruntime-node";
import png from "pngjs";

// onnxruntime-node does not show a file's metadata, so it is read from the protocol buffer: field 14 of ModelProto holds
// entries of a key (field 1) and a value (field 2).
function* fields(bytes) {
  let at = 0;
  const number = () => {
    let value = 0, factor = 1, byte;
    do {
      byte = bytes[at++];
      value += (byte & 127) * factor;
      factor *= 128;
    } while (byte & 128);
    return value;
  };
  while (at < bytes.length) {
    const tag = number(), kind = tag % 8;
    if (kind === 0) number();
    else if (kind === 2) {
      const length = number();
      yield [Math.floor(tag / 8), bytes.subarray(at, at + length)];
      at += length;
    } else at += kind === 1 ? 8 : 4;
  }
}

function metadata(bytes) {
  for (const [field, entry] of fields(bytes)) {
    if (field !== 14) continue;
    const parts = Object.fromEntries(fields(entry));
    if (new TextDecoder().decode(parts[1]) === "dynaconv") return JSON.parse(new TextDecoder().decode(parts[2]));
  }
  throw new Error("this file was not written by dynaconv");
}

const words = process.argv.slice(2);
const flag = words.indexOf("--budget");
const budget = flag < 0 ? null : Number(words.splice(flag, 2)[1]);
const [model, ...pictures] = words;
const facts = metadata(readFileSync(model));
const session = await ort.InferenceSession.create(model);
const { image_size: size, mean, std, classes } = facts;
const feeds = {};
if (facts.dial === "budget") {
  let threshold = Object.values(facts.threshold)[0];
  if (budget !== null) {
    const distance = (row) => Math.abs(row[0] - budget);
    threshold = facts.budgets.reduce((best, row) => (distance(row) < distance(best) ? row : best))[1];
  }
  feeds.budget_threshold = new ort.Tensor("float32", [threshold ?? -Infinity], []);
}
for (const path of pictures) {
  const { width, height, data } = png.PNG.sync.read(readFileSync(path));
  if (width !== size || height !== size) throw new Error(`${path}: expected ${size}x${size} pixels, got ${width}x${height}`);
  const planes = new Float32Array(3 * size * size);
  for (let c = 0; c < 3; c++)
    for (let i = 0; i < size * size; i++) planes[c * size * size + i] = (data[4 * i + c] / 255 - mean[c]) / std[c];
  feeds.images = new ort.Tensor("float32", planes, [1, 3, size, size]);
  const { output, densities } = await session.run(feeds);
  const weights = Array.from(output.data, (v) => Math.exp(v - Math.max(...output.data)));
  const best = weights.indexOf(Math.max(...weights));
  const average = (values) => values.reduce((a, b) => a + b, 0) / values.length;
  const answer = { picture: path, class: classes[best], probability: weights[best] / weights.reduce((a, b) => a + b, 0) };
  if (densities) answer.density = average(Array.from(densities.data));
  console.log(JSON.stringify(answer));
}
