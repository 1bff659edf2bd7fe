# SPDX-License-Identifier: GPL-2.0
#
# Draws what demo-migration has written to the directory "data": guest work over time,
# and how long the guest's first access to each page took. Colours are those of Okabe
# and Ito, which those who see fewer colours can tell apart, too.

font = "DejaVu Sans,15"
if (format eq "svg") {
	set terminal svg size 1600,760 font font background "white"
} else {
	set terminal pngcairo size 1600,760 font font background "white"
}
set output output

set style line 1 lc rgb "#0072B2" lw 2.5
set style line 2 lc rgb "#D55E00" lw 2.5
set style line 3 lc rgb "#999999" lw 2.5 dt (6,3)
set style line 9 lc rgb "#dddddd" lw 1
set border 3
set tics nomirror out
set grid ytics ls 9
set yrange [0:*]

ways = "exits uffd uffd_4"
titles = "'exits' 'userfaultfd, 1 reader' 'userfaultfd, 4 readers'"

set multiplot layout 1,2 title title.", one emulated CPU, 1 ns an instruction" \
	font "DejaVu Sans,19" margins 0.07,0.985,0.12,0.84 spacing 0.085

set title "Guest work through the switch" font "DejaVu Sans,17"
set xlabel "ms since the source has stopped the guest"
set ylabel "records verified per ms"
set xrange [-300:*]
set key at graph 0.99, graph 0.32 right top Left reverse
set arrow 1 from 0, graph 0 to 0, graph 1 nohead lc rgb "#666666" lw 1 dt (2,4)
plot for [i = 1:words(ways)] data."/work.".word(ways, i) using 1:2 with lines ls i \
		title word(titles, i), \
	for [i = 1:words(ways)] data."/marks" using 1:(strcol(3) eq word(ways, i) ? $2 : NaN) \
		with points pt 7 ps 1.8 lc rgb word("#0072B2 #D55E00 #999999", i) notitle, \
	NaN with points pt 7 ps 1.8 lc rgb "black" title "last page has arrived"
unset arrow 1

set title "First accesses of a vCPU to a page, if it had to wait"
set xlabel "µs that the access took, four steps a power of two"
set ylabel "accesses"
set key at graph 0.99, graph 0.99 right top samplen 2.5
set logscale x
set offsets 0, 0, graph 0.1, 0
set xrange [50:10000]
set xtics (50, 100, 200, 500, 1000, 2000, 5000)
set grid xtics ls 9
plot for [i = 1:2] data."/latency.".word(ways, i) using 1:2 with fillsteps ls i \
		fs transparent solid 0.15 noborder notitle, \
	for [i = 1:words(ways)] data."/latency.".word(ways, i) using 1:2 with steps ls i \
		title word(titles, i)
unset multiplot
