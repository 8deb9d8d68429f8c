//! The trainer on the GPU compared with PyTorch and transformers.

use neuroada_ckpt::{
    Adapter, Context, Dtype,
    internals::{
        checkpoint::Shard,
        gpu::CudaDevice,
        train::{Keep, TrainOptions},
    },
};

use crate::{
    driver::{is_real, queue},
    reference::{World, assert_like_transformers, difference, llama_as, numbers, reference, reference_options},
};

#[test]
fn logits_loss_and_gradients_match_transformers() {
    // Float32 on both sides, with sums in a different order. The bound is that of the CPU's test, which states the
    // measured errors.
    let Some(queue) = queue() else { return };
    assert_like_transformers(&CudaDevice::new(queue.gpu(), Dtype::F32).unwrap(), Keep::All, 1e-4);
}

#[test]
fn a_run_matches_the_losses_of_the_published_bypass() {
    let Some(queue) = queue() else { return };
    let expected = Shard::open(&reference("train").join("expected.safetensors")).unwrap();
    // In BF16 the weights themselves are rounded, by up to 2^-9 of their value, and so is everything computed from
    // them.
    for (dtype, most) in [(Dtype::F32, 1e-4), (Dtype::BF16, 0.02)] {
        let world = World::new(llama_as(dtype), 2);
        // Fibers are slow threads: without a GPU only the first steps are compared.
        let whole = reference_options();
        let options = TrainOptions { max_steps: if is_real() { whole.max_steps } else { Some(6) }, ..whole.clone() };
        let device = CudaDevice::new(queue.gpu(), dtype).unwrap();
        let ctx = Context::default();
        let (report, recorded) = world.run_on(&device, &ctx, "a.safetensors", &options, |_| {});
        report.unwrap();
        // The learning rate decays to zero at the last step: in a short run it decays faster after the first.
        let n_alike = if is_real() { usize::MAX } else { 2 };
        let steps = recorded.steps.borrow();
        for (record, loss) in steps.iter().zip(numbers(&expected, "losses")).take(n_alike) {
            let off = (record.loss / loss - 1.0).abs();
            assert!(off < most, "{dtype:?}, step {}: {} not {loss}", record.step, record.loss);
        }
        let (_, on_cpu) = world.run(&ctx, "b.safetensors", &options, |_| {});
        for (record, of_cpu) in steps.iter().zip(on_cpu.steps.borrow().iter()) {
            let off = (record.loss / of_cpu.loss - 1.0).abs();
            assert!(off < most, "{dtype:?}, step {}: {} not {}", record.step, record.loss, of_cpu.loss);
        }
        if is_real() && dtype == Dtype::F32 {
            let adapter = Adapter::open(&world.path("a.safetensors")).unwrap();
            for target in adapter.targets() {
                let rows = adapter.read_rows(&ctx, target, 0..target.layout.n_rows()).unwrap();
                let off = difference(&rows.values, &numbers(&expected, &format!("{}.values", target.name)));
                assert!(off < 1e-3, "{}: values differ by {off}", target.name);
            }
        }
    }
}
