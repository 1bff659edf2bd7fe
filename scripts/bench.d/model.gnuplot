# SPDX-License-Identifier: GPL-2.0
#
# Draws pages per second against vCPUs, from the file "points": vCPUs, way, thousands of
# pages a second, and "model" or "measured".

font = "DejaVu Sans,15"
if (format eq "svg") {
	set terminal svg size 1100,800 font font background "white"
} else {
	set terminal pngcairo size 1100,800 font font background "white"
}
set output output

set style line 1 lc rgb "#E69F00" lw 2.5 pt 5 ps 1.3
set style line 2 lc rgb "#D55E00" lw 2.5 pt 7 ps 1.3
set style line 3 lc rgb "#0072B2" lw 2.5 pt 9 ps 1.5
set style line 4 lc rgb "#56B4E9" lw 2.5 pt 13 ps 1.6
set style line 9 lc rgb "#dddddd" lw 1
set border 3
set tics nomirror out
set grid ls 9
set logscale xy
set xrange [0.9:600]
set yrange [10:*]
set xtics (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
set xlabel "vCPUs"
set ylabel "thousands of pages per second, all vCPUs together"
set key top left reverse Left
set title "A model (lines) and public measurements of earlier proposals (points)\n".\
	"MINOR faults of shmem, ".arch font "DejaVu Sans,16"

ways = "uffd1 uffd exits exits_bitmap"
names = "'userfaultfd, one' 'userfaultfd, one a vCPU' 'exits' 'exits of a bitmap'"
plot for [w = 1:3] points using (strcol(2) eq word(ways, w) && strcol(4) eq "model" ? $1 : NaN):3 \
		with lines ls w title word(names, w).", model", \
	for [w = 1:4] points using (strcol(2) eq word(ways, w) && strcol(4) eq "measured" ? $1 : NaN):3 \
		with points ls w title word(names, w).", measured"
