// Conversations in this browser's IndexedDB; in memory alone where the browser refuses one (private windows).

const memory = new Map();
let opened;

function database() {
  opened ??= new Promise((resolve) => {
    const request = indexedDB.open("qvl", 1);
    request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => resolve(null);
  });
  return opened;
}

async function run(mode, action) {
  const db = await database();
  if (!db) return undefined;
  return new Promise((resolve, reject) => {
    const transaction = db.transaction("conversations", mode);
    const request = action(transaction.objectStore("conversations"));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

/** Every conversation, the newest first: {id, title, changed, turns}. */
export async function list() {
  const all = (await run("readonly", (store) => store.getAll())) ?? [...memory.values()];
  return all.sort((a, b) => b.changed - a.changed);
}

export async function save(conversation) {
  conversation.changed = Date.now();
  memory.set(conversation.id, conversation);
  await run("readwrite", (store) => store.put(conversation));
}

export async function remove(id) {
  memory.delete(id);
  await run("readwrite", (store) => store.delete(id));
}
