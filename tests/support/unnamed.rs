//! What merges in place and out of place leave alike: everything but where they name their adapters.

use std::collections::BTreeMap;

use serde_json::Value;

const KEY: &str = "neuroada.merged";

/// Files with their bytes, without the names of adapters in headers and indexes, and without what a ledger says of these names.
pub(crate) fn unnamed<K: Ord>(files: BTreeMap<K, Vec<u8>>) -> BTreeMap<K, Vec<u8>> {
    files.into_iter().map(|(name, bytes)| (name, without_names(&bytes).unwrap_or(bytes))).collect()
}

/// A tensor file or an index without them; none for other files.
fn without_names(bytes: &[u8]) -> Option<Vec<u8>> {
    if let Ok(mut index) = serde_json::from_slice::<Value>(bytes) {
        index.get("weight_map")?;
        return Some(remove(&mut index, "metadata").to_string().into_bytes());
    }
    let n = u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?) as usize;
    let mut header: Value = serde_json::from_slice(bytes.get(8..n.checked_add(8)?)?).ok()?;
    let document = header["__metadata__"]["neuroada"].as_str().map(str::to_owned);
    if let Some(mut document) = document.and_then(|text| serde_json::from_str::<Value>(&text).ok())
        && document["kind"] == "ledger"
    {
        document.as_object_mut()?.remove("marked");
        header["__metadata__"] = document;
    }
    let header = remove(&mut header, "__metadata__").to_string();
    Some([header.as_bytes(), &bytes[8 + n..]].concat())
}

/// Takes the names out of `object`, and `object` where nothing else is in it.
fn remove<'v>(value: &'v mut Value, object: &str) -> &'v Value {
    if let Some(metadata) = value.get_mut(object).and_then(Value::as_object_mut) {
        metadata.remove(KEY);
        if metadata.is_empty()
            && let Some(value) = value.as_object_mut()
        {
            value.remove(object);
        }
    }
    value
}
