// Asks the service for everything a client can ask, and prints what came back as one JSON document.
//
//     node client.js ADDRESS SETUP.json
//
// SETUP.json says where the .proto file and the descriptors of health and reflection lie, and what to search for.
"use strict";

const fs = require("node:fs");
const grpc = require("@grpc/grpc-js");
const loader = require("@grpc/proto-loader");

const [address, setupFile] = process.argv.slice(2);
const setup = JSON.parse(fs.readFileSync(setupFile, "utf8"));
const choices = { keepCase: true, enums: String, defaults: true, oneofs: true };
const ours = grpc.loadPackageDefinition(loader.loadSync(setup.proto, choices));
const standard = grpc.loadPackageDefinition(loader.loadFileDescriptorSetFromBuffer(
  fs.readFileSync(setup.descriptors), choices));

const credentials = grpc.credentials.createInsecure();
const options = { "grpc.enable_http_proxy": 0, "grpc.max_receive_message_length": 64 << 20 }; // by default 4 MiB
const retrieval = new ours.lookalike.v1.RetrievalService(address, credentials, options);
const health = new standard.grpc.health.v1.Health(address, credentials, options);
const reflection = new standard.grpc.reflection.v1alpha.ServerReflection(address, credentials, options);

const bytes = (base64) => Buffer.from(base64, "base64");
const ids = (answer) => answer.hits.map((hit) => hit.id);
const inTime = (seconds) => ({ deadline: Date.now() + seconds * 1000 });

// proto-loader drops names that it does not know, and a misspelt `k` would ask for 10 hits: they are refused here.
function checkNames(type, message) {
  const fields = new Map(type.field.map((field) => [field.name, field]));
  for (const [name, value] of Object.entries(message)) {
    if (!fields.has(name)) {
      throw new TypeError(`${type.name} has no field ${name}; it has ${[...fields.keys()].join(", ")}`);
    }
    const inner = ours.lookalike.v1[fields.get(name).typeName];
    if (inner) [value].flat().forEach((one) => checkNames(inner.type, one));
  }
}

// The answer to a unary call; an error as { code, details }.
function ask(client, method, request, deadline = inTime(60)) {
  if (client === retrieval) checkNames(client.constructor.service[method].requestType.type, request);
  return new Promise((resolve) => {
    client[method](request, deadline, (error, answer) =>
      resolve(error ? { code: error.code, details: error.details } : answer));
  });
}

// What a bidirectional call answers to `requests`, and how it ended.
function talk(call, requests, onAnswer = () => {}) {
  return new Promise((resolve) => {
    const answers = [];
    call.on("data", (answer) => { answers.push(answer); onAnswer(answers.length); });
    call.on("error", (error) => resolve({ answers, code: error.code }));
    call.on("end", () => resolve({ answers, code: grpc.status.OK }));
    requests.forEach((request) => call.write(request));
  });
}

async function search() {
  const info = await ask(retrieval, "Describe", {});
  const vector = bytes(setup.vectors[0]);
  const byVector = await ask(retrieval, "Search", { query: { vector }, options: { k: 3 } });
  const byImage = await ask(retrieval, "Search", { query: { image: bytes(setup.image) }, options: { k: 3 } });
  const byId = await ask(retrieval, "Search", { query: { image_id: setup.ids[0] }, options: { k: 3 } });
  const filtered = await ask(retrieval, "Search", { query: { vector }, options: { k: 3, filters: [setup.filter] } });
  const queries = setup.vectors.map((one) => ({ vector: bytes(one) }));
  const batch = await ask(retrieval, "SearchBatch", { queries, options: { k: 3 } });
  return { num_rows: Number(info.num_rows), dims: info.dims, vector: byVector.hits, image: ids(byImage), id: ids(byId),
    filtered: ids(filtered), batch: batch.results.map(ids), generation: byVector.info.index_generation,
    described: info.index_generation };
}

async function stream() {
  const one = (tag, query) => ({ tag, batch: { queries: [query], options: { k: 1 } } });
  const requests = setup.ids.map((image_id, place) => one(`t${place}`, { image_id }));
  requests.splice(1, 0, one("lost", { image_id: "no such image" }));
  const call = retrieval.SearchStream(inTime(60));
  const talking = talk(call, requests);
  call.end();
  const { answers, code } = await talking;
  return { code, answers: answers.map((one) => [one.tag, one.failure ? one.failure.code : ids(one.batch.results[0])]) };
}

async function cancel() {
  const endless = retrieval.SearchStream(inTime(60));
  const batch = { queries: [{ image_id: setup.ids[0] }] };
  const cut = await talk(endless, [{ tag: "first", batch }], () => endless.cancel());
  const unary = new Promise((resolve) => {
    const call = retrieval.Search({ query: { image: bytes(setup.image) } }, inTime(60), (error) => resolve(error?.code));
    setTimeout(() => call.cancel(), 1);
  });
  const code = await unary;
  const after = await ask(retrieval, "Search", { query: { image_id: setup.ids[0] }, options: { k: 1 } });
  return { stream: cut.code, seen: cut.answers.length, unary: code, after: ids(after) };
}

function refused() {
  const vector = bytes(setup.vectors[0]);
  const requests = {
    short: { query: { vector: vector.subarray(0, 12) } },
    empty: { query: {} },
    k: { query: { vector }, options: { k: 100000 } },
    column: { query: { vector }, options: { filters: [{ column: "no such column", values: ["x"] }] } },
    picture: { query: { image: Buffer.from("no image at all") } },
    unknown: { query: { image_id: "no such image" } },
    model: { query: { vector }, options: { model_fingerprint: "another" } },
  };
  return Promise.all(Object.entries(requests).map(async ([name, request]) =>
    [name, await ask(retrieval, "Search", request)]));
}

// What a misspelt name leads to.
async function misspelt() {
  const wrong = [["Search", { query: { image_id: "a" }, options: { top_k: 64 } }], ["Delete", { ids: "12" }]];
  const said = [];
  for (const [method, request] of wrong) {
    try { said.push(await ask(retrieval, method, request)); } catch (error) { said.push(String(error)); }
  }
  return said;
}

async function standards() {
  const call = reflection.ServerReflectionInfo(inTime(60));
  const file = setup.service;
  const talking = talk(call, [{ list_services: "" }, { file_containing_symbol: file }]);
  call.end();
  const [listed, described] = (await talking).answers;
  return {
    health: (await ask(health, "Check", { service: "" })).status,
    service: (await ask(health, "Check", { service: setup.service })).status,
    unknown: (await ask(health, "Check", { service: "x" })).code,
    services: listed.list_services_response.service.map((one) => one.name),
    files: described.file_descriptor_response.file_descriptor_proto.length,
  };
}

async function main() {
  const answers = { search: await search(), stream: await stream(), cancel: await cancel(),
    refused: Object.fromEntries(await refused()), standards: await standards(),
    misspelt: await misspelt() };
  const image = bytes(setup.image);
  answers.late = await ask(retrieval, "Search", { query: { image } }, inTime(0.002));
  process.stdout.write(JSON.stringify(answers));
  [retrieval, health, reflection].forEach((client) => client.close());
}

main().catch((error) => { console.error(error); process.exit(1); });
