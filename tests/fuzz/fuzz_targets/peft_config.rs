//! The config of a PEFT adapter, and the record of a low-rank merge: bytes as they come.
#![no_main]

use libfuzzer_sys::fuzz_target;
use neuroada_ckpt::internals::{foreign::{LoraConfig, PeftConfig}, merge::{LedgerDocument, LowRankRecord}};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(config) = PeftConfig::parse("adapter_config.json".as_ref(), bytes)
        && let Ok(lora) = LoraConfig::of(&config)
    {
        let _scaling = lora.scaling("model.layers.0.self_attn.q_proj");
    }
    let _as_it_is = LowRankRecord::parse(bytes);
    if let Ok(text) = std::str::from_utf8(bytes) {
        let _checked = LowRankRecord::parse(format!("{text}\n{}\n", LedgerDocument::checksum(text)).as_bytes());
    }
});
