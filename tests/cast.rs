//! Whole checkpoints in another type, decoded or in other shards.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::{
    fs,
    path::{Path, PathBuf},
};

use half::bf16;
use neuroada_ckpt::{
    CastError, CastOptions, Checkpoint, Context, Dtype, Existing, Failure, TensorRef, cast, diff_checkpoints,
    internals::checkpoint::{Shard, TensorFileWriter},
};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures")
}

fn to(dtype: Dtype) -> CastOptions {
    CastOptions { dtype: Some(dtype), ..CastOptions::default() }
}

fn bytes_of(tensor: TensorRef<'_>) -> Vec<u8> {
    tensor.read(&Context::default(), 0..tensor.info.n_bytes()).unwrap()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|le| f32::from_le_bytes(le.try_into().unwrap())).collect()
}

#[test]
fn quantized_checkpoints_are_decoded_as_their_libraries_decode_them() {
    let folder = tempfile::tempdir().unwrap();
    let ctx = Context { max_memory: 32 << 20, ..Context::default() };
    for entry in fs::read_dir(fixtures().join("reference/quant")).unwrap() {
        let format = entry.unwrap().file_name().into_string().unwrap();
        let Ok(base) = Checkpoint::open(&fixtures().join("quant").join(&format)) else { continue };
        let output = folder.path().join(&format);
        let report = cast(&ctx, &base, &to(Dtype::BF16), Some((&output, Existing::Keep))).unwrap();
        assert_eq!(report.n_decoded as usize, base.codes().weights().len(), "{format}");
        let plain = Checkpoint::open(&output).unwrap();
        assert!(plain.codes().weights().is_empty() && !plain.config().contains_key("quantization_config"), "{format}");
        let reference = Shard::open(&fixtures().join("reference/quant").join(&format).join("dequantised.safetensors"));
        let reference = reference.unwrap();
        for info in reference.header().tensors().iter().filter(|info| !info.name.ends_with(".bfloat16")) {
            let names = [info.name.as_str(), info.name.trim_end_matches(".weight")];
            let found = names.iter().find_map(|name| plain.tensor(name));
            let found = found.unwrap_or_else(|| panic!("{format}: {}", info.name));
            assert_eq!(found.info.dtype, Dtype::BF16);
            let expected = floats(&bytes_of(TensorRef::of_file(&reference, info)));
            let mut rounded: Vec<u16> = expected.iter().map(|&x| bf16::from_f32(x).to_bits()).collect();
            if format == "gpt-oss-mxfp4" {
                // The model holds its experts as `[E, d_in, d_out]`.
                let [e, d_out, d_in] = info.shape[..] else { panic!("a stack") };
                assert_eq!(found.info.shape, [e, d_in, d_out]);
                let at = |stack: u64, row: u64, column: u64| rounded[((stack * d_out + row) * d_in + column) as usize];
                rounded = (0..e)
                    .flat_map(|s| (0..d_in).flat_map(move |c| (0..d_out).map(move |r| (s, r, c))))
                    .map(|(s, r, c)| at(s, r, c))
                    .collect();
            } else {
                assert_eq!(found.info.shape, info.shape, "{format}: {}", info.name);
            }
            let bytes = bytes_of(found);
            let found: Vec<u16> = bytes.chunks_exact(2).map(|le| u16::from_le_bytes([le[0], le[1]])).collect();
            // ModelOpt returns +0 for the code of -0.
            let same = found.iter().zip(&rounded).all(|(a, b)| a == b || (a & 0x7fff == 0 && b & 0x7fff == 0));
            assert!(same, "{format}: {}", info.name);
        }
        // What was not quantized is as it was.
        for tensor in base.tensors().filter(|tensor| tensor.coded().is_none()) {
            assert_eq!(bytes_of(plain.tensor(&tensor.info.name).unwrap()), bytes_of(tensor), "{format}");
        }
        // By value both are the same but for the rounding.
        let diff = diff_checkpoints(&ctx, &base, &plain);
        assert!(diff.unwrap().removed.is_empty() || format == "gpt-oss-mxfp4", "{format}");
    }
}

#[test]
fn plain_checkpoints_are_cast_and_cut_into_other_shards() {
    let folder = tempfile::tempdir().unwrap();
    let (wide, back, cut) = (folder.path().join("wide"), folder.path().join("back"), folder.path().join("cut"));
    let ctx = Context::default();
    let base = Checkpoint::open(&fixtures().join("tiny-llama")).unwrap();
    let report = cast(&ctx, &base, &to(Dtype::F32), Some((&wide, Existing::Keep))).unwrap();
    assert_eq!((report.n_shards, report.n_cast, report.n_decoded), (1, report.n_tensors, 0));
    assert!(wide.join("model.safetensors").exists() && !wide.join("model.safetensors.index.json").exists());
    let wide = Checkpoint::open(&wide).unwrap();
    assert_eq!(wide.config()["torch_dtype"], "float32");
    cast(&ctx, &wide, &to(Dtype::BF16), Some((&back, Existing::Keep))).unwrap();
    assert!(diff_checkpoints(&ctx, &base, &Checkpoint::open(&back).unwrap()).unwrap().equal);
    // Other shards alone: the same bytes, an index that fits.
    let options = CastOptions { max_shard_bytes: Some(40_000), ..CastOptions::default() };
    let report = cast(&ctx, &base, &options, Some((&cut, Existing::Keep))).unwrap();
    assert!(report.n_shards > 3 && report.n_cast == 0);
    let again = Checkpoint::open(&cut).unwrap();
    assert!(again.notes().is_empty() && diff_checkpoints(&ctx, &base, &again).unwrap().equal);
    for shard in again.shards() {
        let n_bytes = shard.file_bytes() - shard.header().data_start();
        assert!(n_bytes <= 40_000 || shard.header().tensors().len() == 1, "{}: {n_bytes}", shard.file_name());
    }
    let report = cast(&ctx, &base, &options, None).unwrap();
    assert!(report.dry_run && report.n_shards as usize == again.shards().len());
}

/// Stops when a pass has come so far.
struct StopAt(std::sync::atomic::AtomicU64, u64);

impl neuroada_ckpt::Observer for StopAt {
    fn advance(&self, n: u64) {
        self.0.fetch_add(n, std::sync::atomic::Ordering::Relaxed);
    }
    fn is_cancelled(&self) -> bool {
        self.0.load(std::sync::atomic::Ordering::Relaxed) > self.1
    }
}

#[test]
fn a_run_that_was_stopped_goes_on_where_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let (whole, output) = (folder.path().join("whole"), folder.path().join("out"));
    let base = Checkpoint::open(&fixtures().join("tiny-llama")).unwrap();
    let options = CastOptions { max_shard_bytes: Some(60_000), resume: true, ..to(Dtype::F32) };
    cast(&Context::default(), &base, &options, Some((&whole, Existing::Keep))).unwrap();
    let stop = StopAt(0.into(), 250_000);
    let ctx = Context { observer: &stop, ..Context::default() };
    let error = cast(&ctx, &base, &options, Some((&output, Existing::Keep))).unwrap_err();
    assert!(error.to_string().contains("stopped") && !output.exists(), "{error}");
    let partial = folder.path().join(".out.neuroada-partial");
    let finished = || {
        fs::read_dir(&partial)
            .unwrap()
            .filter(|entry| entry.as_ref().unwrap().file_name().to_str().unwrap().ends_with(".safetensors"))
    };
    assert!(finished().count() > 0, "shards are kept");
    // One of them is damaged: it is written anew.
    let damaged = finished().next().unwrap().unwrap().path();
    let mut bytes = fs::read(&damaged).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&damaged, bytes).unwrap();
    let report = cast(&Context::default(), &base, &options, Some((&output, Existing::Keep))).unwrap();
    assert!(report.notes.iter().any(|note| note.contains("it was written again")), "{:?}", report.notes);
    for entry in fs::read_dir(&whole).unwrap() {
        let name = entry.unwrap().file_name();
        assert!(fs::read(whole.join(&name)).unwrap() == fs::read(output.join(&name)).unwrap(), "{name:?}");
    }
    assert_eq!(fs::read_dir(&whole).unwrap().count(), fs::read_dir(&output).unwrap().count());
}

#[test]
fn a_number_too_large_for_the_new_type_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let (path, output) = (folder.path().join("m.safetensors"), folder.path().join("out.safetensors"));
    let mut writer = TensorFileWriter::create(&path, Existing::Keep).unwrap();
    let id = writer.add_tensor("w".to_owned(), Dtype::F32);
    let numbers = [1.0f32, 65519.0, -1e9, f32::INFINITY, f32::NAN, 2.0];
    writer.append(id, &numbers.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<_>>()).unwrap();
    writer.finish_tensor(id, vec![2, 3]);
    writer.finish(&Context::default(), &Default::default()).unwrap();
    let base = Checkpoint::open(&path).unwrap();
    let ctx = Context::default();
    let error = cast(&ctx, &base, &to(Dtype::F16), Some((&output, Existing::Keep))).unwrap_err();
    assert!(matches!(error, CastError::Overflow { row: 0, column: 2, .. }), "{error}");
    assert!(error.hint().unwrap().contains("--allow-overflow") && !output.exists());
    let options = CastOptions { allow_overflow: true, ..to(Dtype::F16) };
    let report = cast(&ctx, &base, &options, Some((&output, Existing::Keep))).unwrap();
    assert_eq!(report.n_overflowed, 1);
    let half = Checkpoint::open(&output).unwrap();
    let bits: Vec<u16> =
        bytes_of(half.tensor("w").unwrap()).chunks_exact(2).map(|le| u16::from_le_bytes([le[0], le[1]])).collect();
    assert_eq!(bits[..4], [0x3c00, 0x7bff, 0xfc00, 0x7c00]);
    assert!(half::f16::from_bits(bits[4]).is_nan());
}
