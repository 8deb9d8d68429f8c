//! Biases, trained as a whole together with the deltas.

use neuroada_ckpt::{
    ErrorKind, ExtractOptions, Failure, PackOptions, Which, extract, internals::adapter::ColumnsKind, pack_adapter,
    unmerge,
};

use super::*;

/// The reference Llama with biases everywhere except in `v_proj` and `up_proj`.
fn with_biases(dtype: Dtype) -> impl FnOnce(&Path) -> Checkpoint {
    let sizes = [("self_attn.q_proj", 64), ("self_attn.k_proj", 16), ("self_attn.o_proj", 64), ("mlp.gate_proj", 176)];
    let mut biases = Vec::new();
    for layer in 0..3 {
        for (module, size) in sizes.into_iter().chain([("mlp.down_proj", 64)]) {
            let values = (0..size).map(|i| ((i * 37 + layer * 11) % 101) as f64 / 500.0 - 0.1).collect();
            biases.push((format!("model.layers.{layer}.{module}.bias"), values));
        }
    }
    llama_with(dtype, biases)
}

const N_BIASES: u64 = 3 * (64 + 16 + 64 + 176 + 64);

fn options() -> TrainOptions {
    TrainOptions { train_bias: true, max_steps: Some(12), eval_every: Some(5), ..reference_options() }
}

/// A world with biases, evaluated on some rows of its data.
fn world(dtype: Dtype) -> World {
    let mut world = World::new(with_biases(dtype), 2);
    let mut eval = Dataset::new();
    for example in world.data.iter().skip(220) {
        eval.push(example.tokens, example.n_prompt());
    }
    world.eval = Some(eval);
    world
}

/// The loss on the world's held-out rows.
fn eval_loss(world: &World, model: &Model<CpuDevice>) -> Option<f64> {
    let (ctx, device) = (Context::default(), CpuDevice::new());
    let batches = Batches::in_order(world.eval.as_ref().unwrap(), options().limits());
    let mut work = Workspace::new(&device, &model.config, batches.max_tokens(), Keep::Nothing).unwrap();
    Some(mean_loss(&ctx, &device, model, batches.iter_from(0), &mut work).unwrap().loss)
}

#[test]
fn gradients_of_biases_equal_finite_differences() {
    let folder = tempfile::tempdir().unwrap();
    let (ctx, device) = (Context::default(), CpuDevice::new());
    let (base, expected) = model(folder.path(), "qwen2");
    let of = |tensor: &str| numbers(&expected, tensor);
    let batch = packed(&of("input_ids"), &of("labels"), Some(&of("attention_mask")), 24);
    let mask = mask(&base, 1, &folder.path().join("mask.safetensors"));
    let mut model = Model::load(&ctx, &device, &base).unwrap();
    model.attach(&ctx, &device, &base, &mask).unwrap();
    model.attach_biases(&ctx, &device, &base, &mask).unwrap();
    assert_eq!(model.n_trained() as u64, mask.nnz() + 3 * (64 + 16 + 16));
    let on_device = DeviceBatch::new(&device, &model.config, &batch).unwrap();
    let mut work = Workspace::new(&device, &model.config, batch.n_tokens(), Keep::All).unwrap();
    forward(&device, &model, &on_device, &mut work).unwrap();
    losses(&device, &model, &on_device, &mut work, Some(1.0)).unwrap();
    backward(&device, &mut model, &on_device, &mut work).unwrap();
    let mut loss = |model: &Model<CpuDevice>| -> f64 {
        forward(&device, model, &on_device, &mut work).unwrap();
        losses(&device, model, &on_device, &mut work, None).unwrap().iter().map(|&loss| f64::from(loss)).sum()
    };
    for layer in 0..3 {
        let grad = model.layers[layer].qkv.bias_deltas.as_ref().unwrap().grad.clone();
        let largest = grad.iter().fold(0.0f32, |largest, g| largest.max(g.abs()));
        // Queries, keys and values; a step of 0.01 gives an error of 1e-4 from curvature.
        for at in [0, 33, 63, 64, 79, 80, 87, 95] {
            let mut moved = |by: f32| {
                let qkv = &mut model.layers[layer].qkv;
                qkv.bias_deltas.as_mut().unwrap().theta[at] = by;
                device.patch_bias(qkv.bias.as_mut().unwrap(), qkv.bias_deltas.as_ref().unwrap()).unwrap();
                loss(&model)
            };
            let expected = (moved(0.01) - moved(-0.01)) / 0.02;
            moved(0.0);
            let off = (f64::from(grad[at]) - expected).abs();
            assert!(off < 3e-3 * f64::from(largest), "layer {layer}, {at}: {} not {expected}", grad[at]);
        }
    }
}

#[test]
fn trained_biases_are_merged_and_extracted_exactly() {
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
        let world = world(dtype);
        let (ctx, device) = (Context::default(), CpuDevice::new());
        let report = world.run(&ctx, "a.safetensors", &options(), |_| {}).0.unwrap();
        assert!(report.eval_loss < report.first_eval_loss, "{report:?}");
        assert_eq!(report.n_trained, world.mask.nnz() + N_BIASES);
        let without = TrainOptions { train_bias: false, ..options() };
        let other = world.run(&ctx, "b.safetensors", &without, |_| {}).0.unwrap();
        assert_ne!(report.eval_loss, other.eval_loss);

        let adapter = Adapter::open(&world.path("a.safetensors")).unwrap();
        assert_eq!(adapter.notes().training.as_ref().unwrap()["options"]["train_bias"], true);
        let biases: Vec<_> = adapter.targets().iter().filter(|target| target.name.ends_with(".bias")).collect();
        assert_eq!(biases.len(), 15);
        for target in &biases {
            assert_eq!((target.shape.len(), target.uniform_k), (1, Some(1)), "{}", target.name);
            let rows = adapter.read_rows(&ctx, target, 0..target.layout.n_rows()).unwrap();
            assert!(rows.values.iter().any(|&delta| delta != 0.0), "{} did not move", target.name);
        }
        let plain = Adapter::open(&world.path("b.safetensors")).unwrap();
        let weights = adapter.targets().iter().filter(|target| target.shape.len() == 2);
        assert!(weights.map(|target| &target.name).eq(plain.targets().iter().map(|target| &target.name)));
        assert!(!plain.notes().training.as_ref().unwrap()["options"].as_object().unwrap().contains_key("train_bias"));

        // As trained, as merged, as evaluated.
        for scale in [1.0, 0.5] {
            let merged = world.path(&format!("merged-{scale}"));
            let input = MergeInput { adapter: world.path("a.safetensors"), scale: Some(scale) };
            merge(&ctx, world.base.root(), &[input], &MergeOptions::new_checkpoint(&merged)).unwrap();
            let of_merge = Model::load(&ctx, &device, &Checkpoint::open(&merged).unwrap()).unwrap();
            let loss = eval_loss(&world, &of_merge);
            assert_eq!(scale == 1.0, loss == report.eval_loss, "{dtype:?}: bit for bit");
            let mut applied = Model::load(&ctx, &device, &world.base).unwrap();
            applied.apply(&ctx, &device, &world.base, &adapter, scale).unwrap();
            assert_eq!(eval_loss(&world, &applied), loss, "{dtype:?}: bit for bit");
            for (a, b) in of_merge.linears().zip(applied.linears()) {
                assert_eq!(a.bias, b.bias);
            }
        }
        let merged = world.path("merged-1");
        let bytes = |folder: &Path| fs::read(folder.join("model.safetensors")).unwrap();
        assert!(bytes(&merged) != bytes(world.base.root()));

        // The changes extracted again as an adapter, biases included.
        let tuned = Checkpoint::open(&merged).unwrap();
        let (again, delta) = (world.path("again"), world.path("delta.safetensors"));
        let found =
            extract(&ctx, &world.base, &tuned, &ExtractOptions::default(), Some((&delta, Existing::Keep))).unwrap();
        assert!(found.exact && found.tensors.iter().any(|tensor| tensor.tensor.ends_with(".bias")));
        let input = MergeInput { adapter: delta, scale: None };
        merge(&ctx, world.base.root(), &[input], &MergeOptions::new_checkpoint(&again)).unwrap();
        // Their headers name different adapters.
        let tensor_data = |folder: &Path| {
            let bytes = bytes(folder);
            let header_bytes = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            bytes[8 + header_bytes..].to_vec()
        };
        assert!(tensor_data(&again) == tensor_data(&merged));
        unmerge(&ctx, &merged, &Which::All, &MergeOptions::in_place()).unwrap();
        assert!(bytes(&merged) == bytes(world.base.root()));
    }
}

#[test]
fn a_resumed_run_with_biases_equals_an_uninterrupted_one() {
    let world = world(Dtype::BF16);
    let (ctx, options) = (Context::default(), options());
    let (whole, told_whole) = world.run(&ctx, "whole.safetensors", &options, |_| {});
    let stop = StopAfter(AtomicU64::new(7));
    let stopping = Context { observer: &stop, ..ctx };
    let (stopped, recorded) = world.run(&stopping, "parts.safetensors", &options, |_| {});
    let stopped = stopped.unwrap_err();
    assert!(matches!(stopped, TrainError::Stopped { step: 7 }), "{stopped}");
    let other = TrainOptions { train_bias: false, ..options.clone() };
    let error = world.run(&ctx, "parts.safetensors", &other, |job| job.resume = true).0.unwrap_err().to_string();
    assert!(error.ends_with("options.train_bias was true, is null"), "{error}");
    // On a different number of threads.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(5).build().unwrap();
    let (parts, told_rest) = pool.install(|| world.run(&ctx, "parts.safetensors", &options, |job| job.resume = true));
    recorded.steps.borrow_mut().extend(told_rest.steps.borrow().iter());
    recorded.evals.borrow_mut().extend(told_rest.evals.borrow().iter());
    assert_eq!(recorded.timeless(), told_whole.timeless());
    assert_eq!(parts.unwrap(), whole.unwrap());
    let bytes = |name: &str| fs::read(world.path(name)).unwrap();
    assert_eq!(bytes("parts.safetensors"), bytes("whole.safetensors"));
}

#[test]
fn a_base_without_biases_is_refused_and_nothing_is_written() {
    let world = World::new(llama_as(Dtype::BF16), 1);
    let files = || fs::read_dir(world.folder.path()).unwrap().count();
    let before = files();
    let error = world.run(&Context::default(), "a.safetensors", &options(), |_| {}).0.unwrap_err();
    let what = "narrow: the chosen projections have no biases, and an adapter can only add to existing tensors";
    assert!(error.to_string().ends_with(what), "{error}");
    assert_eq!((error.kind(), files()), (ErrorKind::Usage, before));
}

#[test]
fn biases_of_another_base_are_refused() {
    let world = world(Dtype::BF16);
    let (ctx, device) = (Context::default(), CpuDevice::new());
    let short = TrainOptions { max_steps: Some(1), ..options() };
    world.run(&ctx, "a.safetensors", &short, |_| {}).0.unwrap();
    let adapter = Adapter::open(&world.path("a.safetensors")).unwrap();
    let tensor = world.base.tensor("model.layers.1.mlp.gate_proj.bias").unwrap();
    let (path, at) = (tensor.shard.path(), tensor.shard.file_range(tensor.info).start as usize);
    let mut bytes = fs::read(path).unwrap();
    bytes[at + 1] ^= 0x80;
    fs::write(path, bytes).unwrap();
    let other = Checkpoint::open(world.base.root()).unwrap();
    let mut loaded = Model::load(&ctx, &device, &other).unwrap();
    let error = loaded.apply(&ctx, &device, &other, &adapter, 1.0).unwrap_err().to_string();
    assert!(error.contains("tensor \"model.layers.1.mlp.gate_proj.bias\": the adapter was made from"), "{error}");
    let input = MergeInput { adapter: world.path("a.safetensors"), scale: None };
    let merged = world.path("merged");
    let error = merge(&ctx, other.root(), &[input], &MergeOptions::new_checkpoint(&merged)).unwrap_err().to_string();
    assert!(error.contains("model.layers.1.mlp.gate_proj.bias"), "{error}");
    assert!(!merged.exists());
}

#[test]
fn columns_of_packed_adapters_with_biases_are_derived() {
    let world = world(Dtype::BF16);
    let ctx = Context::default();
    let short = TrainOptions { max_steps: Some(2), ..options() };
    world.run(&ctx, "a.safetensors", &short, |_| {}).0.unwrap();
    let plain = Adapter::open(&world.path("a.safetensors")).unwrap();
    let options = PackOptions { base: Some(&world.base), ..PackOptions::default() };
    let path = world.path("packed");
    pack_adapter(&ctx, &plain, &options, &path, Existing::Keep).unwrap();
    let packed = Adapter::open_with_base(&ctx, &path, &world.base).unwrap();
    assert_eq!(packed.packed_columns(), Some(ColumnsKind::Derived));
    assert_eq!(packed.id(&ctx).unwrap(), plain.id(&ctx).unwrap());
    packed.write_plain(&ctx, &world.path("b.safetensors"), Existing::Keep).unwrap();
    assert_eq!(fs::read(world.path("b.safetensors")).unwrap(), fs::read(plain.path()).unwrap());
}
