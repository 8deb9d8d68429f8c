//! The loss curve of a training run, as an SVG drawing.

use std::fmt::Write as _;

/// The size of the image and its margins, in pixels.
const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 44.0;
const BOTTOM: f64 = 52.0;

/// Maximum number of points per line; more could not be told apart.
const MAX_POINTS: usize = 700;

/// Draws losses over optimizer steps: the training loss, raw (faint) and smoothed (bold), and the evaluation loss.
///
/// `train` and `eval` are `(step, loss)`, with ascending steps; losses that are not finite or extremely large are left
/// out. The colors are readable on white and on black. The same numbers give the same bytes.
pub fn loss_curve(train: &[(u64, f64)], eval: &[(u64, f64)]) -> String {
    let (train, eval) = (finite(train), finite(eval));
    let frame = Frame::around(train.iter().chain(&eval));
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{HEIGHT}\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         role=\"img\" font-family=\"system-ui, -apple-system, 'Segoe UI', 'DejaVu Sans', sans-serif\" font-size=\"13\">\n\
         <title>Loss over optimizer steps</title>\n"
    );
    // This gray has a contrast of 4.5 on both white and black.
    svg += "<g fill=\"#767676\" stroke=\"none\">\n";
    let mut lines = String::new();
    for loss in &frame.loss_ticks {
        let y = frame.y(*loss);
        let message = decimal(*loss, frame.loss_step);
        line(
            &mut svg,
            format_args!("<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{message}</text>", LEFT - 8.0, y + 4.5),
        );
        line(&mut lines, format_args!("<path d=\"M{LEFT} {y:.1}H{:.1}\"/>", WIDTH - RIGHT));
    }
    for step in &frame.step_ticks {
        let (x, y) = (frame.x(*step), HEIGHT - BOTTOM);
        line(&mut svg, format_args!("<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{step}</text>", y + 20.0));
        line(&mut lines, format_args!("<path d=\"M{x:.1} {y:.1}v5\" stroke-opacity=\"1\"/>"));
    }
    let middle = (LEFT + WIDTH - RIGHT) / 2.0;
    line(
        &mut svg,
        format_args!("<text x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\">optimizer step</text>", HEIGHT - 10.0),
    );
    line(&mut svg, format_args!("<text x=\"16\" y=\"{:.1}\">loss</text>", TOP - 20.0));
    svg += "</g>\n<g fill=\"none\" stroke=\"#767676\" stroke-opacity=\"0.35\">\n";
    svg += &lines;
    line(
        &mut svg,
        format_args!("<path d=\"M{LEFT} {:.1}H{:.1}\" stroke-opacity=\"1\"/>", HEIGHT - BOTTOM, WIDTH - RIGHT),
    );
    svg += "</g>\n";

    let thinned = thin(&train);
    let smooth = thin(&smoothed(&train));
    let mut legend = Legend { x: LEFT + 60.0 };
    if !train.is_empty() {
        let is_noisy = train.len() >= 20;
        let (faint, bold) = if is_noisy { (0.35, &smooth) } else { (1.0, &Vec::new()) };
        svg += &polyline(&frame, &thinned, "#2f7fd1", 1.2, faint);
        svg += &polyline(&frame, bold, "#2f7fd1", 2.4, 1.0);
        svg += &legend.entry("#2f7fd1", if is_noisy { "train (bold: smoothed)" } else { "train" });
        svg += &single(&frame, &train, "#2f7fd1");
    }
    if !eval.is_empty() {
        svg += &polyline(&frame, &thin(&eval), "#d9611c", 2.0, 1.0);
        if eval.len() <= 60 {
            for &point in &eval {
                svg += &dot(&frame, point, "#d9611c");
            }
        }
        svg += &legend.entry("#d9611c", "evaluation");
    }
    if train.is_empty() && eval.is_empty() {
        let y = HEIGHT / 2.0;
        line(
            &mut svg,
            format_args!(
                "<text x=\"{middle:.1}\" y=\"{y}\" text-anchor=\"middle\" fill=\"#767676\">no losses yet</text>"
            ),
        );
    }
    svg + "</svg>\n"
}

fn finite(points: &[(u64, f64)]) -> Vec<(f64, f64)> {
    // Larger values are broken too, and would overflow in the conversion to pixels.
    points.iter().filter(|(_, loss)| loss.abs() < 1e30).map(|&(step, loss)| (step as f64, loss)).collect()
}

fn line(out: &mut String, message: std::fmt::Arguments<'_>) {
    writeln!(out, "{message}").expect("writing to a string cannot fail");
}

/// The scales of the axes.
struct Frame {
    first: f64,
    last: f64,
    low: f64,
    high: f64,
    step_ticks: Vec<f64>,
    loss_ticks: Vec<f64>,
    loss_step: f64,
}

impl Frame {
    fn around<'a>(points: impl Iterator<Item = &'a (f64, f64)>) -> Self {
        let (mut first, mut last, mut low, mut high) = (f64::MAX, f64::MIN, f64::MAX, f64::MIN);
        for &(step, loss) in points {
            (first, last) = (first.min(step), last.max(step));
            (low, high) = (low.min(loss), high.max(loss));
        }
        if first > last {
            (first, last, low, high) = (0.0, 1.0, 0.0, 1.0);
        }
        // A run whose first recorded step is small is shown from step 0.
        if first <= (last - first) / 20.0 || first == last {
            first = 0.0;
        }
        last = last.max(first + 1.0);
        // A flat curve gets a margin.
        if high - low < 1e-9 * high.abs().max(1e-9) {
            let room = (high.abs() * 0.1).max(1e-3);
            (low, high) = (low - room, high + room);
        }
        let loss_step = nice_step(high - low, 6.0);
        let (low, high) = ((low / loss_step).floor() * loss_step, (high / loss_step).ceil() * loss_step);
        let step_step = nice_step(last - first, 8.0).max(1.0);
        let ticks = |from: f64, to: f64, step: f64| {
            let n = ((to - from) / step + 1e-9).floor() as u32;
            (0..=n).map(|i| from + f64::from(i) * step).collect()
        };
        let step_ticks = ticks((first / step_step).ceil() * step_step, last, step_step);
        Self { first, last, low, high, step_ticks, loss_ticks: ticks(low, high, loss_step), loss_step }
    }

    fn x(&self, step: f64) -> f64 {
        LEFT + (step - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)
    }

    fn y(&self, loss: f64) -> f64 {
        HEIGHT - BOTTOM - (loss - self.low) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)
    }
}

/// 1, 2 or 5 times a power of ten, such that about `n` of them make up `range`.
fn nice_step(range: f64, n: f64) -> f64 {
    let rough = range / n;
    let power = 10f64.powf(rough.log10().floor());
    match rough / power {
        x if x <= 1.0 => power,
        x if x <= 2.0 => 2.0 * power,
        x if x <= 5.0 => 5.0 * power,
        _ => 10.0 * power,
    }
}

/// Formats with as many decimals as ticks `step` apart need.
fn decimal(x: f64, step: f64) -> String {
    let decimals = (-step.log10().floor()).clamp(0.0, 9.0) as usize;
    format!("{x:.decimals$}")
}

/// At most [`MAX_POINTS`] points; each is the mean of the same number of neighbors.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= MAX_POINTS {
        return points.to_vec();
    }
    points.chunks(points.len().div_ceil(MAX_POINTS)).map(mean).collect()
}

fn mean(points: &[(f64, f64)]) -> (f64, f64) {
    let (step, loss) = points.iter().fold((0.0, 0.0), |sum, point| (sum.0 + point.0, sum.1 + point.1));
    (step / points.len() as f64, loss / points.len() as f64)
}

/// The moving average over a window of a twentieth of the run, centered on each point; narrower at the ends, so that
/// it stays centered.
fn smoothed(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let half = (points.len() / 40).max(2);
    let mut sums = vec![0.0];
    for (_, loss) in points {
        sums.push(sums.last().expect("begins with 0") + loss);
    }
    let smooth = |i: usize| {
        let half = half.min(i).min(points.len() - 1 - i);
        (points[i].0, (sums[i + half + 1] - sums[i - half]) / (2 * half + 1) as f64)
    };
    (0..points.len()).map(smooth).collect()
}

fn polyline(frame: &Frame, points: &[(f64, f64)], color: &str, width: f64, opacity: f64) -> String {
    if points.len() < 2 {
        return String::new();
    }
    let mut out = String::from("<polyline points=\"");
    for &(step, loss) in points {
        write!(out, "{:.1},{:.1} ", frame.x(step), frame.y(loss)).expect("writing to a string cannot fail");
    }
    out.pop();
    line(
        &mut out,
        format_args!(
            "\" fill=\"none\" stroke=\"{color}\" stroke-width=\"{width}\" stroke-opacity=\"{opacity}\" stroke-linejoin=\"round\"/>"
        ),
    );
    out
}

fn dot(frame: &Frame, (step, loss): (f64, f64), color: &str) -> String {
    format!("<circle cx=\"{:.1}\" cy=\"{:.1}\" r=\"3.5\" fill=\"{color}\"/>\n", frame.x(step), frame.y(loss))
}

/// A dot if there is a single point, which makes no line.
fn single(frame: &Frame, points: &[(f64, f64)], color: &str) -> String {
    if let [point] = points { dot(frame, *point, color) } else { String::new() }
}

/// The names of the series, side by side.
struct Legend {
    x: f64,
}

impl Legend {
    fn entry(&mut self, color: &str, message: &str) -> String {
        let (x, y) = (self.x, TOP - 20.0);
        self.x += 56.0 + message.len() as f64 * 7.5;
        format!(
            "<path d=\"M{x:.1} {:.1}h24\" stroke=\"{color}\" stroke-width=\"3\"/>\n\
             <text x=\"{:.1}\" y=\"{y:.1}\" fill=\"#767676\">{message}</text>\n",
            y - 4.5,
            x + 32.0
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_numbers_around_all_points() {
        let frame = Frame::around([(1.0, 2.31), (300.0, 0.87)].iter());
        assert_eq!(
            frame.loss_ticks.iter().map(|&tick| decimal(tick, frame.loss_step)).collect::<Vec<_>>(),
            ["0.5", "1.0", "1.5", "2.0", "2.5"]
        );
        assert_eq!(frame.step_ticks, [0.0, 50.0, 100.0, 150.0, 200.0, 250.0, 300.0]);
        assert_eq!((frame.x(0.0), frame.x(300.0)), (LEFT, WIDTH - RIGHT));
        assert_eq!((frame.y(0.5), frame.y(2.5)), (HEIGHT - BOTTOM, TOP));
    }

    #[test]
    fn every_run_can_be_plotted() {
        let many: Vec<(u64, f64)> = (0..100_000).map(|step| (step, 2.0 + (step as f64).sin())).collect();
        for (train, eval) in [
            (&[][..], &[][..]),
            (&[(5, 1.0)], &[]),
            (&[(1, 1.0), (2, 1.0)], &[(1, f64::NAN)]),
            (&[(1, f64::INFINITY), (2, 3.0)], &[(0, 0.0)]),
            (&[(7, -1e300), (8, 1e-300)], &[]),
            (&many, &many[..50]),
        ] {
            let svg = loss_curve(train, eval);
            assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
            assert!(svg.len() < 60_000, "{} bytes", svg.len());
        }
    }

    #[test]
    fn smoothing_keeps_a_straight_line() {
        let straight: Vec<(f64, f64)> = (0..200).map(|i| (f64::from(i), f64::from(i))).collect();
        assert_eq!(smoothed(&straight), straight);
    }

    #[test]
    fn both_series_are_named() {
        let train: Vec<(u64, f64)> = (1..=30).map(|step| (step, 1.0 / step as f64)).collect();
        let svg = loss_curve(&train, &[(10, 0.5), (20, 0.25)]);
        for part in ["train (bold: smoothed)", "evaluation", "optimizer step", ">loss<", ">0.8<", ">30<"] {
            assert!(svg.contains(part), "{part}");
        }
        assert_eq!(svg.matches("<circle").count(), 2);
    }
}
