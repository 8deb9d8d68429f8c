//! The date that chat templates may use.

/// A moment in seconds since 1970 in UTC, returned by `strftime_now` in chat templates.
///
/// It is given by the caller, not read from the system, so that the same input gives the same tokens.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Clock {
    seconds: u64,
}

impl Clock {
    /// `seconds` since 1970 in UTC.
    pub fn new(seconds: u64) -> Self {
        // The end of the year 9999: later dates need more digits than their formats have.
        Self { seconds: seconds.min(253_402_300_799) }
    }

    /// Formats like `strftime` in the C locale; unknown specifiers are left unchanged.
    pub(super) fn format(self, format: &str) -> String {
        let date = Date::of(self.seconds / 86_400);
        let (hour, minute, second) = (self.seconds / 3600 % 24, self.seconds / 60 % 60, self.seconds % 60);
        let hour_12 = (hour + 11) % 12 + 1;
        let mut out = String::new();
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let mut directive = chars.next();
            let bare = directive == Some('-');
            if bare {
                directive = chars.next();
            }
            let two = |n: u64| if bare { n.to_string() } else { format!("{n:02}") };
            match directive {
                Some('Y') => out += &format!("{:04}", date.year),
                Some('y') => out += &two(date.year % 100),
                Some('m') => out += &two(date.month),
                Some('d') => out += &two(date.day),
                Some('j') if bare => out += &date.day_of_year.to_string(),
                Some('j') => out += &format!("{:03}", date.day_of_year),
                Some('B') => out += MONTHS[date.month as usize - 1],
                Some('b' | 'h') => out += &MONTHS[date.month as usize - 1][..3],
                Some('A') => out += DAYS[date.weekday as usize],
                Some('a') => out += &DAYS[date.weekday as usize][..3],
                Some('H') => out += &two(hour),
                Some('I') => out += &two(hour_12),
                Some('M') => out += &two(minute),
                Some('S') => out += &two(second),
                Some('p') => out += if hour < 12 { "AM" } else { "PM" },
                Some('F') => out += &format!("{:04}-{:02}-{:02}", date.year, date.month, date.day),
                Some('T') => out += &format!("{hour:02}:{minute:02}:{second:02}"),
                Some('%') => out.push('%'),
                other => {
                    out += if bare { "%-" } else { "%" };
                    out.extend(other);
                }
            }
        }
        out
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

struct Date {
    year: u64,
    /// From 1.
    month: u64,
    /// From 1.
    day: u64,
    /// From 1.
    day_of_year: u64,
    /// From 0, Sunday.
    weekday: u64,
}

impl Date {
    /// The date `days` after 1970-01-01, a Thursday.
    fn of(days: u64) -> Self {
        let (mut year, mut left) = (1970, days);
        let is_leap = |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
        let length = |year: u64| if is_leap(year) { 366 } else { 365 };
        while left >= length(year) {
            left -= length(year);
            year += 1;
        }
        let day_of_year = left + 1;
        let lengths = [31, length(year) - 337, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
        let mut month = 1;
        for length in lengths {
            if left < length {
                break;
            }
            left -= length;
            month += 1;
        }
        Self { year, month, day: left + 1, day_of_year, weekday: (days + 4) % 7 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_match_the_calendar() {
        // date -u -d @1709210096
        let clock = Clock::new(1_709_210_096);
        assert_eq!(clock.format("%d %b %Y"), "29 Feb 2024");
        assert_eq!(
            clock.format("%A, %B %-d, %H:%M:%S %I %p %j %y %%"),
            "Thursday, February 29, 12:34:56 12 PM 060 24 %"
        );
        assert_eq!(clock.format("%F %T %Q%"), "2024-02-29 12:34:56 %Q%");
        assert_eq!(Clock::new(0).format("%a %F %I"), "Thu 1970-01-01 12");
        assert_eq!(Clock::new(951_782_399).format("%F"), "2000-02-28");
        assert_eq!(Clock::new(978_220_800).format("%F %j"), "2000-12-31 366");
        assert_eq!(Clock::new(u64::MAX).format("%F"), "9999-12-31");
    }
}
